"""Check MoDE with every tuning method of the installed PEFT.

    python tests/peft_methods.py        # seconds; writes docs/methods.md

Each is put on a tiny Llama in both orders, trained, saved, loaded, resumed, switched off and
merged. `yes`: it does what it does without MoDE, and MoDE is trained, saved and kept. `refused`: a
clear error. `PEFT cannot`: PEFT itself does not, without MoDE.
"""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, get_peft_model
from torch import Tensor

import depthmix
from depthmix.errors import DepthmixError
from models import tiny_model

DOCS = Path(__file__).parents[1] / "docs"
CONFIG = depthmix.MoDEConfig(k=3)
IDS = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(5))
STEPS = ("attach", "attach to PEFT", "train", "save, load", "resume", "disable", "merge")

# What a method needs beside its defaults, on a Llama of width 32.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2, "target_modules": None},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 16},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "OFT": {"oft_block_size": 4, "r": 0},
    "POLY": {"n_tasks": 1},
    "ROAD": {"group_size": 8},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 16},
}
_TARGETS = ["q_proj", "o_proj"]


def config_of(method: str) -> PeftConfig:
    """Return a small configuration of a tuning method."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(method)]
    known = inspect.signature(cls).parameters
    usual: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if "target_modules" in known:
        usual["target_modules"] = list(_TARGETS)
    if "r" in known:
        usual["r"] = 4
    if "num_virtual_tokens" in known:
        usual["num_virtual_tokens"] = 3
    return cls(**{k: v for k, v in {**usual, **OPTIONS.get(method, {})}.items() if k in known})


def logits(model: Any) -> Tensor:
    """Return the model's logits on fixed tokens."""
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if isinstance(model, PeftModel) and _needs_task_ids(model):
        inputs["task_ids"] = torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[no-any-return]


def _needs_task_ids(model: PeftModel) -> bool:
    return model.active_peft_config.peft_type in ("POLY", "MULTITASK_PROMPT_TUNING")


def train(model: PeftModel, steps: int = 3) -> None:
    """Take a few steps on every trainable parameter."""
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if _needs_task_ids(model):
        inputs["task_ids"] = torch.zeros(2, dtype=torch.long)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(**inputs, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def mode_of(model: Any) -> dict[str, Tensor]:
    """Return what is trained of MoDE."""
    return {n: p for n, p in model.named_parameters() if "depthmix" in n and p.requires_grad}


def check(method: str) -> dict[str, str]:
    """Run all steps and return what came out of each."""
    torch.manual_seed(0)
    base = tiny_model("llama")
    results = dict.fromkeys(STEPS, "")
    try:
        plain = get_peft_model(copy.deepcopy(base), config_of(method))
        train(plain)
    except Exception as error:
        return {**results, "attach": f"not built: {_short(error)}"}
    try:
        model = depthmix.attach(copy.deepcopy(base), CONFIG, config_of(method))
        results["attach"] = "yes"
        depthmix.attach(get_peft_model(copy.deepcopy(base), config_of(method)), CONFIG)
        results["attach to PEFT"] = "yes"
    except DepthmixError as error:
        return {**results, "attach": f"refused: {_short(error)}"}
    before = {n: p.detach().clone() for n, p in mode_of(model).items()}
    train(model)
    moved = before and all(not torch.equal(p, before[n]) for n, p in mode_of(model).items())
    results["train"] = "yes" if moved else "no"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        _step(
            results, "save, load", lambda: _loads(base, model, folder), lambda: _plain(base, plain)
        )
        _step(results, "resume", lambda: _resumes(base, model, folder), lambda: _plain(base, plain))
    _step(results, "disable", lambda: _disables(base, model), lambda: _disables(base, plain))
    _step(results, "merge", lambda: _merges(model), lambda: _merges(plain))
    return results


def _step(
    results: dict[str, str], name: str, ours: Callable[[], bool], theirs: Callable[[], bool]
) -> None:
    """Run a step with MoDE; where it does not work, without."""
    try:
        results[name] = "yes" if ours() else "no"
    except DepthmixError as error:
        results[name] = f"refused: {_short(error)}"
    except Exception as error:
        results[name] = f"no: {_short(error)}"
    if results[name].startswith("no"):
        try:
            works = theirs()
        except Exception:
            works = False
        results[name] = results[name] if works else "PEFT cannot"


def _loads(base: Any, model: Any, folder: str) -> bool:
    loaded = depthmix.load(copy.deepcopy(base), folder)
    return torch.allclose(logits(loaded), logits(model), atol=1e-5)


def _plain(base: Any, plain: Any) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        return torch.allclose(logits(loaded), logits(plain), atol=1e-5)


def _resumes(base: Any, model: Any, folder: str) -> bool:
    """Train on what was loaded: the same parameters move as before."""
    loaded = depthmix.load(copy.deepcopy(base), folder, is_trainable=True)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in mode_of(loaded).items()}
    train(loaded, steps=1)
    moved = bool(before) and all(not torch.equal(p, before[n]) for n, p in mode_of(loaded).items())
    return moved and {n for n, p in loaded.named_parameters() if p.requires_grad} == names


def _disables(base: Any, model: Any) -> bool:
    with model.disable_adapter():
        return torch.equal(logits(model), logits(base))


def _merges(model: Any) -> bool:
    expected = logits(model)
    merged = copy.deepcopy(model).merge_and_unload()
    return torch.allclose(logits(merged), expected, atol=1e-4)


def _short(error: BaseException) -> str:
    return f"{' '.join(str(error).split()) or type(error).__name__}"[:120]


NOTES = """
Refused with any method: one batch through several adapters (`adapter_names`). As with any module
in `modules_to_save`, PEFT combines no weighted adapters that carry MoDE (`add_weighted_adapter`)
and leaves it out when it converts an adapter to LoRA (`convert_to_lora`).

## Quantised base models

bitsandbytes' 4 and 8 bits: loss and gradients are those of the same model with its weights
written out, and an adapter loads onto a fresh base (`tests/test_quantised.py`, on a CPU).
`depthmix train --load_in_4bit` is QLoRA with MoDE, whose own parameters stay in fp32. On a CPU,
bitsandbytes 0.50 repacks a 4-bit weight in the first evaluation and gives no right gradients
after that, with MoDE or without: there, `train --load_in_4bit` refuses evaluations. Using a model
in 4 bits (`depthmix generate out --load-in-4bit`) works on a CPU too, where layers have 64 x n
inputs and 32 x n outputs; what has others is refused. Any other quantisation works whose modules
can be called: the weight of none is read.
""".splitlines()


def main() -> None:
    """Check all methods and write the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for method in sorted(m.value for m in PEFT_TYPE_TO_CONFIG_MAPPING):
        results = check(method)
        rows.append([method, *results.values()])
        print(*rows[-1], sep=" | ", flush=True)
    lines = [
        "# Tuning methods",
        "",
        f"Every tuning method of PEFT {peft.__version__} with MoDE on a tiny Llama, by "
        "`python tests/peft_methods.py`. PEFT cannot: it does not work there without MoDE either.",
        "",
        f"| method | {' | '.join(STEPS)} |",
        "|---" * (len(STEPS) + 1) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        *NOTES,
    ]
    (DOCS / "methods.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
