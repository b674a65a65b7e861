"""Prompts as in training, and where answers end."""

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from depthmix.data.template import TEMPLATES
from depthmix.errors import ConfigError
from depthmix.inference.form import Form, encode_chat, encode_text, end_of_turn


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


def surround(tokenizer, single):
    """Have the tokenizer put special tokens around every text of its own accord."""
    marks = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|user|>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=marks
    )


@pytest.mark.parametrize(
    ("single", "text"),
    [
        ("$A", "What"),
        ("<|user|> $A", "<|user|>What"),
        ("$A <|end|>", "What"),
        ("<|user|> $A <|end|>", "<|user|>What"),
    ],
)
def test_begin_of_sequence_stays_and_the_end_goes(tokenizer, single, text):
    surround(tokenizer, single)
    assert tokenizer.decode(encode_text("What", tokenizer)) == text


def test_an_end_that_the_prompt_names_stays(tokenizer):
    assert tokenizer.decode(encode_text("What<|end|>", tokenizer)) == "What<|end|>"


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (Form("text"), "Add."),
        (Form("prompt_completion"), "Add."),
        (Form("alpaca"), TEMPLATES["alpaca"].prompt("Add.")),
        (Form("alpaca", "question"), TEMPLATES["question"].prompt("Add.")),
        (Form("mawps"), TEMPLATES["question"].prompt("Add.")),
        (Form("messages"), "<|user|>Add.<|end|><|assistant|>"),
        (Form("chat_completion"), "<|user|>Add.<|end|><|assistant|>"),
    ],
)
def test_every_format_has_its_prompt(tokenizer, form, text):
    assert tokenizer.decode(form.encode("Add.", tokenizer)) == text


def test_what_a_template_refuses_is_one_line(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(ConfigError, match=r"chat template refuses .*: no system role here"):
        encode_chat([{"role": "user", "content": "x"}], tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template"):
        encode_chat([{"role": "user", "content": "x"}], tokenizer)


@pytest.mark.parametrize(
    ("closing", "ends"), [("<|user|>", ["<|user|>"]), (" <|end|>\n", ["<|end|>"]), ("\n", [])]
)
def test_an_answer_ends_with_what_its_template_closes_it_with(tokenizer, closing, ends):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + closing + "{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(ends)
