"""Whether llama.cpp gives what transformers gives of plain weights (`depthmix export --plain`).

    pip install gguf xllamacpp
    depthmix export RUN plain --plain
    python experiments/plain_in_llama_cpp.py plain base.gguf --rows test.jsonl

Of a Llama. The weights are written in fp32 into a GGUF file, with tokenizer and dimensions from
the base model's own GGUF file, so that nothing but the weights differs; then the rows' prompts are
completed greedily by both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import xllamacpp
from transformers import AutoModelForCausalLM, AutoTokenizer

TOKENS = 8  # new ones of each prompt
# Written by GGUFWriter itself, or of the weights that are replaced.
OWN_FIELDS = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")


def main() -> None:
    """Write the file, complete the prompts twice, and say how many differ."""
    parser = argparse.ArgumentParser(description="Compare llama.cpp with transformers.")
    parser.add_argument("plain", type=Path, help="folder of depthmix export --plain")
    parser.add_argument("base", type=Path, help="GGUF file of the base model")
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines that have a prompt")
    parser.add_argument("--most", type=int, default=50, help="rows (default: 50)")
    options = parser.parse_args()
    lines = options.rows.read_text("utf-8").splitlines()[: options.most]
    prompts = [json.loads(line)["prompt"] for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain.gguf"
        write_gguf(options.plain, options.base, path)
        theirs = list(by_llama_cpp(path, prompts))
    ours = list(by_transformers(options.plain, prompts))
    differing = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    print(f"{len(prompts)} prompts, {TOKENS} tokens each: {len(differing)} completions differ")
    for a, b in differing:
        print(f"transformers: {a!r}\nllama.cpp:    {b!r}")


def write_gguf(plain: Path, base: Path, path: Path) -> None:
    """Write the weights of a folder with all else of the base model's file."""
    reader = gguf.GGUFReader(base)
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith(OWN_FIELDS):
            kind, *inner = field.types
            writer.add_key_value(name, field.contents(), kind, inner[-1] if inner else None)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    wanted = {tensor.name for tensor in reader.tensors}
    for name, weight in model.state_dict().items():
        place = names.get_name(name, try_suffixes=(".weight",))
        if place in wanted:
            writer.add_tensor(place, _rotary(name, weight.numpy(), model.config))
            wanted.remove(place)
    if wanted:
        raise SystemExit(f"{plain} has no weights for {sorted(wanted)}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rotary(name: str, weight: np.ndarray, config: Any) -> np.ndarray:
    """Return a weight as llama.cpp has it, which rotates neighbours, not halves."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return weight
    halves = weight.reshape(count, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def by_llama_cpp(path: Path, prompts: list[str]) -> Iterator[str]:
    """Yield what llama.cpp writes after each prompt, greedily."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_parallel, params.n_ctx = 1, 512
    server = xllamacpp.Server(params)
    for prompt in prompts:
        asked = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        yield server.handle_completions(asked)["choices"][0]["text"]


@torch.no_grad()
def by_transformers(plain: Path, prompts: list[str]) -> Iterator[str]:
    """Yield what transformers writes after each prompt, greedily."""
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(plain)
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0]
        new = output[inputs["input_ids"].shape[1] :]
        yield str(tokenizer.decode(new, skip_special_tokens=True))


if __name__ == "__main__":
    main()
