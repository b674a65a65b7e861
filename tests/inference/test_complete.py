"""Completing: within the window, to the end that training taught, streamed or not."""

import argparse
import json

import pytest
import torch

from depthmix.carry.saved_run import SavedRun
from depthmix.cli import main
from depthmix.errors import ConfigError
from depthmix.inference.complete import complete
from depthmix.inference.form import Form
from depthmix.inference.loading import load_for_use

SAMPLING = argparse.Namespace(max_new_tokens=20, temperature=0.0, top_p=1.0)


def saying(model, token):
    """Have a model say one token, whatever comes before it."""
    head = model.get_output_embeddings()
    head.register_forward_hook(
        lambda _m, _a, out: out + 1e4 * (torch.arange(out.shape[-1]) == token)
    )
    return model


def generated(model, tokenizer):
    texts = []
    prompt = [tokenizer("What")["input_ids"]]
    answer = complete(model, tokenizer, prompt, SAMPLING, said=texts.append)
    return answer[0], "".join(texts)


@pytest.fixture
def loaded(tiny):
    return load_for_use(SavedRun.find(tiny), Form())


def test_what_is_handed_on_is_what_is_returned(loaded):
    answer, said = generated(*loaded)
    assert answer
    assert said == answer


def test_answers_end_where_the_window_ends(loaded):
    model, tokenizer = loaded
    saying(model, tokenizer.convert_tokens_to_ids("W"))
    ids = tokenizer("W" * 250)["input_ids"]
    assert len(ids) == 250
    assert complete(model, tokenizer, [ids], SAMPLING) == ["W" * 6]
    with pytest.raises(ConfigError, match="a prompt of 256 tokens fills the model's window of 256"):
        complete(model, tokenizer, [tokenizer("W" * 256)["input_ids"]], SAMPLING)


@pytest.mark.parametrize(
    ("flags", "end"), [([], "<|end|>"), (["--eos_token", "<|user|>"], "<|user|>")]
)
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_answers_end_with_what_ended_the_rows(tiny, tmp_path, flags, end, kind):
    """For messages that is what the chat template closes an answer with, an assistant's mark."""
    row = {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}
    path, out, template = tmp_path / "rows.jsonl", str(tmp_path / "out"), tmp_path / "chat.jinja"
    path.write_text(json.dumps(row if kind == "messages" else {"text": "x"}))
    template.write_text("{% for m in messages %}{{ m.content }}<|assistant|>{% endfor %}")
    command = ["train", "--model_name_or_path", tiny, "--dataset", str(path), "--output_dir", out]
    command += ["--max_steps", "1", "--disable_tqdm", *flags]
    if kind == "messages":
        command, end = [*command, "--chat_template_path", str(template)], "<|assistant|>"
    assert main(command) == 0
    saved = SavedRun.find(out)
    model, tokenizer = load_for_use(saved, Form.of(saved))
    saying(model.get_base_model(), tokenizer.convert_tokens_to_ids(end))
    assert generated(model, tokenizer) == ("", "")
