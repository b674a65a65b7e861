"""`depthmix serve`, a real server in a process of its own, asked by OpenAI's client."""

import copy
import json
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from jinja2 import TemplateError

from depthmix.cli import main
from depthmix.inference.complete import complete
from depthmix.inference.form import Form
from depthmix.inference.loading import load_tuned
from serving import serving

KEY = "a key"
PROMPT = "What is 3 + 4?"


class Greedy:
    """How tokens are drawn."""

    max_new_tokens, temperature, top_p = 6, 0.0, 1.0


MESSAGES = [{"role": "user", "content": PROMPT}]
GREEDY = {"model": "tuned", "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def run(tiny, rows, tmp_path_factory):
    """A tuned run, `tuned` in this folder; chats take the form of its rows."""
    parent = tmp_path_factory.mktemp("serve")
    flags = ["--model_name_or_path", tiny, "--dataset", rows, "--max_steps", "2", "--k", "2"]
    assert main(["train", *flags, "--output_dir", str(parent / "tuned")]) == 0
    return parent


@pytest.fixture(scope="module")
def address(run):
    with serving(run, "tuned", "--api-key", KEY) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def loaded(run):
    return load_tuned(str(run / "tuned"))


def expected(loaded, text):
    """What the model itself says to a text."""
    model, tokenizer = loaded
    return complete(model, tokenizer, [Form().encode(text, tokenizer)], Greedy())[0]


def test_a_completion_is_what_generate_gives(client, loaded):
    reply = client.completions.create(prompt=PROMPT, **GREEDY)
    assert reply.choices[0].text == expected(loaded, PROMPT)
    assert reply.usage.completion_tokens <= 6
    assert reply.model == "tuned"


def test_a_chat_is_the_tokenizers_template(client, loaded):
    reply = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    wanted = expected(loaded, f"<|user|>{PROMPT}<|end|><|assistant|>")
    assert reply.choices[0].message.content == wanted


def test_streams(client, loaded):
    chunks = client.completions.create(prompt=PROMPT, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected(loaded, PROMPT)
    chunks = list(client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected(loaded, f"<|user|>{PROMPT}<|end|><|assistant|>")
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


def test_eight_at_once_get_what_each_gets_alone(client, loaded):
    prompts = [f"What is {i} + {i * i}? " * (1 + i) for i in range(8)]

    def ask(prompt):
        return client.completions.create(prompt=prompt, **GREEDY).choices[0].text

    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(ask, prompts))
    assert replies == [expected(loaded, prompt) for prompt in prompts]


def test_tokens_are_drawn_unless_the_temperature_is_0(client):
    many = [
        client.completions.create(model="tuned", prompt=PROMPT, max_tokens=6, seed=seed)
        for seed in range(6)
    ]
    assert len({reply.choices[0].text for reply in many}) > 1


def test_a_seed_is_of_its_request_whatever_else_is_asked_at_once(client):
    """A request waits its turn; what is drawn before that must not use up its seed."""

    def ask(seed):
        drawn = client.completions.create(model="tuned", prompt=PROMPT, max_tokens=12, seed=seed)
        return drawn.choices[0].text

    alone = ask(7)
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(ask, [1, 7, 2, 7, 3, 7, 4, 7]))
    assert replies[1::2] == [alone] * 4
    assert len({ask(None) for _ in range(6)}) > 1


def test_a_reply_ends_before_a_stop_text(client, loaded):
    whole = expected(loaded, PROMPT)
    middle = len(whole) // 2
    for stop in (whole[middle], [whole[middle : middle + 2], "no such text"]):
        text = whole.partition(stop if isinstance(stop, str) else stop[0])[0]
        asked = {"prompt": PROMPT, "stop": stop, **GREEDY}
        assert client.completions.create(**asked).choices[0].text == text
        chunks = client.completions.create(stream=True, **asked)
        assert "".join(chunk.choices[0].text for chunk in chunks) == text


LONG = {"model": "tuned", "prompt": "a", "max_tokens": 10_000, "temperature": 0}
LONG["generation_config"] = json.dumps({"max_new_tokens": 10_000, "min_new_tokens": 240})
HEADERS = {"Authorization": f"Bearer {KEY}"}


def test_who_hangs_up_is_not_waited_for(address, client):
    """A reply of all that fits the window takes its time; the next one does not wait for it."""
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{address}/completions", json=LONG, headers=HEADERS, timeout=0.05)
    assert client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text


def test_who_hangs_up_in_a_stream_is_not_waited_for(address, client):
    asked = {"json": {**LONG, "stream": True}, "headers": HEADERS, "timeout": 60}
    with httpx.stream("POST", f"{address}/completions", **asked) as reply:
        assert next(reply.iter_lines()).startswith("data:")
    assert client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text


BAD = {
    "another model": ({"model": "other"}, "pinned to 'tuned'"),
    "too long": ({"prompt": "word " * 300}, "fills the model's window of 256"),
    "empty": ({"prompt": ""}, "the prompt is empty"),
    "no string": ({"prompt": ["a", "b"]}, "prompt must be a string"),
    "temperature": ({"temperature": -1}, "temperature"),
    "tokens": ({"max_tokens": -3}, "max_new_tokens"),
    "several": ({"n": 3}, "not supported here: n"),
    "log-probabilities": ({"logprobs": 5}, "not supported here: logprobs"),
    "the token's log-probability": ({"logprobs": 0}, "not supported here: logprobs"),
    "one log-probability": ({"logprobs": 1}, "not supported here: logprobs"),
    "the prompt, too": ({"echo": True}, "not supported here: echo"),
    "other words": ({"presence_penalty": 1}, "not supported here: presence_penalty"),
    "less of the same": ({"frequency_penalty": 0.5}, "not supported here: frequency_penalty"),
    "a bias": ({"logit_bias": {"5": 1}}, "not supported here: logit_bias"),
    "a suffix": ({"suffix": "."}, "not supported here: suffix"),
    "unknown": ({"extra_body": {"beams": 4}}, "Unexpected fields"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_say_what_is_wrong(client, name):
    changes, message = BAD[name]
    with pytest.raises(openai.APIStatusError, match=message) as raised:
        client.completions.create(**{"prompt": PROMPT, **GREEDY, **changes})
    assert 400 <= raised.value.status_code < 500


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logprobs", True),
        ("top_logprobs", 1),
        ("parallel_tool_calls", False),
        ("tool_choice", "none"),
        ("verbosity", "low"),
    ],
)
def test_a_chat_is_not_answered_without_what_it_asks_for(client, name, value):
    with pytest.raises(openai.BadRequestError, match=f"not supported here: {name}"):
        client.chat.completions.create(messages=MESSAGES, **GREEDY, **{name: value})


def test_fields_that_ask_for_nothing_are_taken(client):
    nothing = {"n": 1, "best_of": 1, "echo": False, "presence_penalty": 0.0, "logprobs": None}
    assert client.completions.create(prompt=PROMPT, **GREEDY, **nothing).choices[0].text
    nothing = {"n": 1, "logprobs": False, "response_format": {"type": "text"}, "top_logprobs": 0}
    reply = client.chat.completions.create(messages=MESSAGES, **GREEDY, **nothing)
    assert reply.choices[0].message.content


def test_broken_bodies(address):
    headers = {"Authorization": f"Bearer {KEY}"}
    for body in (b"{", b"[]", b'{"model": "tuned"}'):
        for path in ("completions", "chat/completions"):
            reply = httpx.post(f"{address}/{path}", content=body, headers=headers, timeout=60)
            assert 400 <= reply.status_code < 500, (body, path)
    for path in ("load_model", "reset", "v1/none"):  # transformers' own, for any model
        reply = httpx.post(f"{address.removesuffix('/v1')}/{path}", headers=headers, json={})
        assert reply.status_code == 404


def test_a_wrong_key_is_refused(address):
    for key in ("another", "ä"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert httpx.get(f"{address}/models", headers=headers).status_code == 401
    assert httpx.get(f"{address}/models").status_code == 401
    assert httpx.get(address.replace("/v1", "/health")).status_code == 200


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tuned"]


def test_ctrl_c_ends_an_export_in_mid_reply(run, capsys):
    """And the key is read from the environment."""
    assert main(["export", str(run / "tuned"), str(run / "exported")]) == 0
    with serving(run, "exported", DEPTHMIX_API_KEY=KEY) as (address, process):
        with openai.OpenAI(base_url=address, api_key=KEY, max_retries=0) as client:
            reply = client.completions.create(**{**GREEDY, "model": "exported"}, prompt=PROMPT)
            assert reply.choices[0].text
            client.completions.create(model="exported", prompt=PROMPT, stream=True, max_tokens=200)
            process.send_signal(signal.SIGINT)
            begun = time.monotonic()
            assert process.wait(timeout=60) == 130
            assert time.monotonic() - begun < 30
        assert process.stderr.read().strip().splitlines()[-1] == "depthmix: stopped"


def test_what_cannot_be_listened_on_is_one_line(run, address, capsys):
    port = address.rpartition(":")[2].removesuffix("/v1")
    assert main(["serve", str(run / "tuned"), "--port", port]) == 2
    assert "cannot be listened on: Address already in use" in capsys.readouterr().err
    assert main(["serve", str(run / "tuned"), "--", "--max-model-len", "9"]) == 2
    assert "go with --engine vllm" in capsys.readouterr().err


@pytest.mark.parametrize("row_format", ["question", "alpaca"])
def test_a_model_tuned_on_questions_is_asked_in_their_form(loaded, row_format):
    _, tokenizer = loaded
    form, tokenizer = Form(row_format), copy.deepcopy(tokenizer)
    tokenizer.chat_template = form.question_template(tokenizer)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    messages = [*said, {"role": "user", "content": 'A "quoted"\nquestion?'}]
    ids = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == form.encode(messages[-1]["content"], tokenizer)
    with pytest.raises(TemplateError, match="takes no system message"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}, *messages])


VLLM = """#!{python}
import json, os, pathlib, sys
told = dict(arguments=sys.argv[1:], key=os.environ.get("VLLM_API_KEY"))
told["model"] = json.loads((pathlib.Path(sys.argv[2]) / "config.json").read_text())["auto_map"]
pathlib.Path({out!r}).write_text(json.dumps(told))
sys.exit(3)
"""


def test_vllm_is_given_an_export(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    argv = ["serve", str(run / "tuned"), "--engine", "vllm", "--api-key", KEY]
    assert main(argv) == 2
    assert "there is no program vllm here" in capsys.readouterr().err
    program, out = tmp_path / "vllm", tmp_path / "told.json"
    program.write_text(VLLM.format(python=sys.executable, out=str(out)))
    program.chmod(0o755)
    assert main([*argv, "--port", "8123", "--", "--max-model-len", "9"]) == 3
    told = json.loads(out.read_text())
    serve, folder, *options = told["arguments"]
    assert serve == "serve"
    assert not Path(folder).exists()  # only for that time
    assert options[:3] == ["--trust-remote-code", "--served-model-name", str(run / "tuned")]
    assert options[-2:] == ["--max-model-len", "9"]
    assert "8123" in options
    assert told["key"] == KEY
    assert set(told["model"]) == {"AutoModel", "AutoModelForCausalLM"}
