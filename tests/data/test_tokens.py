"""What is supervised: by prefixes of a conversation, and as TRL does it for the others."""

import json
import pickle
import re
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from tokenizers import processors
from trl import SFTConfig, SFTTrainer

from command_fixtures import CHAT_TEMPLATE, build_model, build_tokenizer
from depthmix.data.conversation import reads_parts, renderer, supervised
from depthmix.data.counts import count_tokens
from depthmix.data.load import Source, load_source
from depthmix.data.tokens import IGNORED, RefusedRow, tokenised
from depthmix.errors import DataError

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": "x"},
    {"role": "user", "content": "B"},
    {"role": "assistant", "content": "y"},
    {"role": "user", "content": "C"},
]
# Some of what templates do: blanks behind the end token, a thought that only the last answer
# keeps, tools beside the last question, an end token of their own, nothing for a generation prompt.
PLAIN = CHAT_TEMPLATE
LINES = PLAIN.replace("{{ eos_token }}", "{{ eos_token }}\n")
THOUGHT = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and loop.last %}(hm){% endif %}"
    "{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS_LAST = (
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m == asked[-1] %}T{% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRIMMED = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def rows_of(messages, **more):
    row = {"messages": json.dumps(messages), **{n: json.dumps(v) for n, v in more.items()}}
    return Dataset.from_list([row])


def marked(tokenizer, rows):
    """Return rows as text, what is supervised in square brackets, blanks as they are."""
    texts = []
    for row in rows:
        text = ""
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (token, IGNORED)
            piece = tokenizer.decode([token])
            text += f"[{piece}]" if label == token else piece
        texts.append(text.replace("][", ""))
    return texts


@pytest.mark.parametrize(
    ("template", "messages", "supervise", "expected"),
    [
        (PLAIN, CHAT[1:5], "assistant", ["uAea[xe]uBea[ye]"]),
        (PLAIN, CHAT[1:5], "last", ["uAeaxeuBea[ye]"]),
        (PLAIN, CHAT[1:5], "all", ["[uAeaxeuBeaye]"]),
        (PLAIN, CHAT[1:], "assistant", ["uAea[xe]uBea[ye]uCe"]),
        (PLAIN, CHAT[2:5], "assistant", ["[axe]uBea[ye]"]),
        (LINES, CHAT[1:5], "assistant", ["uAe\na[xe]\nuBe\na[ye]\n"]),
        (THOUGHT, CHAT[1:5], "assistant", ["uAe\na[(hm)xe]\n", "uAe\naxe\nuBe\na[(hm)ye]\n"]),
        (THOUGHT, CHAT[1:5], "last", ["uAe\naxe\nuBe\na[(hm)ye]\n"]),
        (THOUGHT, CHAT[1:3], "assistant", ["uAe\na[(hm)xe]\n"]),
        (TOOLS_LAST, CHAT[1:5], "assistant", ["uTAea[xe]", "uAeaxeuTBea[ye]"]),
        (TRIMMED, CHAT[1:5], "assistant", ["user: A\nassistant:[ x]\nuser: B\nassistant:[ y]\n"]),
    ],
)
def test_answers_are_found_in_any_template(template, messages, supervise, expected):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    found = marked(tokenizer, tokenised(rows_of(messages), "messages", tokenizer, supervise))
    short = {"<|user|>": "u", "<|assistant|>": "a", "<|end|>": "e"}
    for long, sign in short.items():
        found = [text.replace(long, sign) for text in found]
    assert found == expected


TEMPLATES = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_published_models(path):
    """Every answer is supervised with what ends it, and nothing of what the user says."""
    tokenizer = build_tokenizer()
    tokenizer.bos_token = "<|user|>"
    tokenizer.chat_template = (
        path.read_text("utf-8").replace("{% generation %}", "").replace("{% endgeneration %}", "")
    )
    contents = [("user", "AAA"), ("assistant", "xxx"), ("user", "BBB"), ("assistant", "yyy")]
    messages = [{"role": role, "content": content} for role, content in contents]
    render = renderer(tokenizer, parts=reads_parts(tokenizer))
    rows = supervised(messages, 0, "assistant", render)
    spans = [row.text[start:end] for row in rows for start, end in row.spans]
    assert [re.findall("AAA|BBB|xxx|yyy", span) for span in spans] == [["xxx"], ["yyy"]]
    assert all("AAA" in row.text for row in rows)
    if not path.stem.startswith("glm4"):  # ended by the next question alone
        assert all(span.endswith(">") for span in spans)


def test_tool_calls_are_rendered_as_written():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"function": {"name": "f", "arguments": {"when": "2024-05-01", "n": 2**70, "x": 0.1}}}
    messages = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    rows = rows_of(messages, tools=[{"name": "f"}])
    (text,) = marked(tokenizer, tokenised(rows, "messages", tokenizer))
    arguments = f'{{"when": "2024-05-01", "n": {2**70}, "x": 0.1}}'
    assert text == f'[{{"name": "f"}}]<|user|>A<|end|><|assistant|>[f{arguments}<|end|>]'


def test_tools_and_calls_that_a_template_leaves_out_are_an_error():
    tokenizer = build_tokenizer()
    with pytest.raises(DataError, match="have tools, but the chat template leaves them out"):
        tokenised(rows_of(CHAT, tools=[{"name": "f"}]), "messages", tokenizer)
    call = {"function": {"name": "fetch", "arguments": {}}}
    messages = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    with pytest.raises(DataError, match="message 2: the chat template leaves out the call of fet"):
        tokenised(rows_of(messages), "messages", tokenizer)


def test_a_prompt_of_messages_is_not_supervised():
    tokenizer = build_tokenizer()
    row = {"prompt": json.dumps(CHAT[1:4]), "completion": json.dumps(CHAT[4:5])}
    rows = tokenised(Dataset.from_list([row]), "chat_completion", tokenizer)
    (text,) = marked(tokenizer, rows)
    assert text.endswith("<|assistant|>x<|end|><|user|>B<|end|><|assistant|>[y<|end|>]")


def test_options_of_the_template_in_a_row():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ mood }}" + CHAT_TEMPLATE
    rows = rows_of(CHAT[1:3], chat_template_kwargs={"mood": "!"})
    assert marked(tokenizer, tokenised(rows, "messages", tokenizer))[0].startswith("!<|user|>")


def test_what_a_template_refuses_is_one_error():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RefusedRow, match=r"does not take the messages: roles must") as refused:
        tokenised(rows_of(CHAT), "messages", tokenizer)
    assert json.loads(refused.value.row["messages"]) == CHAT
    again = pickle.loads(pickle.dumps(refused.value))  # as it comes from another process
    assert (str(again), again.row) == (str(refused.value), refused.value.row)


PAIRS = [
    {"prompt": "What is 3", "completion": " + 4?"},
    {"prompt": "", "completion": "The answer is 7."},
    {"prompt": "What is 3 ", "completion": "+ 4<|end|>"},
]


@pytest.mark.parametrize("post", [None, "<|user|> $A", "<|user|> $A <|end|>"])
@pytest.mark.parametrize("format", ["prompt_completion", "text"])
def test_prompts_and_texts_are_tokenised_as_trl_does(tmp_path, format, post):
    tokenizer = build_tokenizer()
    if post:
        special = [(s, tokenizer.convert_tokens_to_ids(s)) for s in ("<|user|>", "<|end|>")]
        single = processors.TemplateProcessing(single=post, special_tokens=special)
        tokenizer.backend_tokenizer.post_processor = single
    rows = Dataset.from_list(
        PAIRS if format == "prompt_completion" else [{"text": p["completion"]} for p in PAIRS]
    )
    trainer = SFTTrainer(
        model=build_model(len(tokenizer)),
        args=SFTConfig(str(tmp_path), bf16=False, activation_checkpointing=False),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    end = tokenizer.eos_token_id
    ours = tokenised(rows, format, tokenizer)
    for mine, theirs in zip(ours, trainer.train_dataset, strict=True):
        ids = theirs["input_ids"]
        while ids[-2:] == [end, end]:  # where the tokenizer ends texts itself, TRL ends them twice
            ids = ids[:-1]
        assert mine["input_ids"] == ids
        assert mine["labels"][-1] == end
        assert mine["labels"][1:] == theirs["labels"][1 : len(ids)]


def test_everything_of_a_prompt_is_supervised_on_request():
    tokenizer = build_tokenizer()
    (text,) = marked(
        tokenizer,
        tokenised(Dataset.from_list(PAIRS[:1]), "prompt_completion", tokenizer, "all"),
    )
    assert text == "[What is 3 + 4?<|end|>]"


@pytest.mark.parametrize("packing", [False, True])
def test_the_trainer_takes_the_rows_as_they_are(tmp_path, packing):
    tokenizer = build_tokenizer()
    rows = tokenised(rows_of(CHAT[1:5]), "messages", tokenizer)
    trainer = SFTTrainer(
        model=build_model(len(tokenizer)),
        args=SFTConfig(
            str(tmp_path),
            bf16=False,
            activation_checkpointing=False,
            packing=packing,
            packing_strategy="wrapped",
            max_length=9,
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    labels = trainer.train_dataset[0]["labels"]
    assert labels == rows[0]["labels"][:9]


def test_counts():
    tokens = {
        "input_ids": [[1] * 4, [1] * 9, [1] * 6],
        "labels": [[-100, -100, 1, 1], [-100] * 3 + [1] * 6, [-100] * 5 + [1]],
    }
    rows = Dataset.from_dict(tokens)
    counts = count_tokens(rows, 5)
    assert counts.lengths.tolist() == [4, 9, 6]
    assert counts.supervised.tolist() == [2, 6, 1]
    assert counts.left.tolist() == [2, 2, 0]
    assert (counts.longer, counts.cut, counts.dropped) == (2, 1, 1)
    assert count_tokens(rows, 5, keep_end=True).left.tolist() == [2, 5, 1]
    assert count_tokens(rows.select([2, 0]), None).supervised.tolist() == [1, 2]
    assert counts.share == pytest.approx(9 / 19)


def test_a_template_may_render_nothing_before_the_first_answer():
    def render(messages, generation):
        return "".join(f"<{m['content']}>" for m in messages)

    (found,) = supervised(CHAT[2:3], 0, "assistant", render)
    assert (found.text, found.spans) == ("<x>", ((0, 3),))


def test_what_was_read_and_tokenised_once_is_found_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"messages": CHAT[1:3]}) for _ in range(3)))

    def files():
        rows, format = load_source(Source([str(path)]))
        tokens = tokenised(rows, format, build_tokenizer())
        found = {file["filename"] for data in (rows, tokens) for file in data.cache_files}
        return {name: Path(name).stat().st_mtime_ns for name in found}

    first = files()
    assert len(first) == 2
    assert files() == first
