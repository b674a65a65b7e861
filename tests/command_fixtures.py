"""A tiny model with a real tokenizer, and small data files, for the tests of the command line."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from depthmix.cli import main

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["What is 3 + 4? The answer is 7."], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(vocabulary):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a Llama of 4 layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder)
    build_model(len(tokenizer)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """A JSONL file of 12 additions in the format prompt-completion."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [{"prompt": f"What is {n} + 4?", "completion": f" {n + 4}."} for n in range(12)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.fixture
def train(tiny, rows, tmp_path):
    """Run `depthmix train` on the tiny model; returns the status."""

    def run(*flags, output="out"):
        return main(
            [
                *("train", "--model_name_or_path", tiny, "--dataset", rows),
                *("--output_dir", str(tmp_path / output), "--per_device_train_batch_size", "4"),
                *("--k", "2", "--logging_steps", "1", "--disable_tqdm", *flags),
            ]
        )

    return run
