"""Compare settings of the router and the distillation on a few hundred short questions.

    python experiments/router_defaults.py --data mawps_train_raw.json --runs lora uniform prior

trains the embedded model once a setting, on the same examples in the same order, and writes one
line of JSON a run: held-out loss of the ensemble and of every late layer alone, mean weights and
entropy of the router. The settings are those of RUNS; docs/experiments.md tells what came out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import depthmix
from depthmix.analysis.layers import collate, encode, score_rows
from depthmix.carry.adapters import mode_only_config
from depthmix.carry.depth import restricted
from depthmix.model.discovery import discover
from depthmix.model.runtime import runtime_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from embedded_model import embedded_model


@dataclass
class Run:
    """One setting: a tuning method, MoDE or none, learning rates."""

    mode: dict[str, Any] | None = None
    late_only: bool = False
    lora: bool = True
    lr: float = 5e-4
    router_lr: float = 1e-3
    norm_lr: float = 1e-3
    notes: str = field(default="")


# Nothing is left to the library's defaults, which these runs decide upon.
NORM = {
    "distill_into": "adaptation",
    "distill_fraction": 1.0,
    "router_prior": 0.9,
    "adaptation": "norm",
}
PAPER = NORM | {"distill_into": "layers", "router_prior": None}
AFFINE = NORM | {"adaptation": "affine"}
LOW_RANK = NORM | {"adaptation": "low_rank"}

RUNS = {
    "lora": Run(),
    "paper": Run(mode=PAPER),
    "paper_l0.1": Run(mode=PAPER | {"distill_weight": 0.1}),
    "layers_p0.8": Run(mode=PAPER | {"router_prior": 0.8}),
    "layers_p0.8_router1e-2": Run(mode=PAPER | {"router_prior": 0.8}, router_lr=1e-2),
    "layers_p0.9_l0.1": Run(mode=PAPER | {"router_prior": 0.9, "distill_weight": 0.1}),
    "uniform": Run(mode=NORM | {"router_prior": None}, norm_lr=1e-2),
    "norm": Run(mode=NORM, norm_lr=1e-2),
    "norm_lr1e-3": Run(mode=NORM, norm_lr=1e-3),
    "norm_router1e-2": Run(mode=NORM, norm_lr=1e-2, router_lr=1e-2),
    "norm_p0.5": Run(mode=NORM | {"router_prior": 0.5}, norm_lr=1e-2),
    "norm_balance": Run(mode=NORM | {"balance_weight": 0.01}, norm_lr=1e-2, router_lr=1e-2),
    "norm_warmup": Run(mode=NORM | {"router_warmup_steps": 20}, norm_lr=1e-2, router_lr=1e-2),
    "norm_l0": Run(mode=NORM | {"distill_weight": 0.0}, norm_lr=1e-2),
    "last_norm_only": Run(
        mode=NORM | {"k": 2, "router_prior": 0.9999, "distill_weight": 0.0}, norm_lr=1e-2
    ),
    "affine": Run(mode=AFFINE),
    "low_rank": Run(mode=LOW_RANK, norm_lr=3e-3),
    "low_rank_lr1e-2": Run(mode=LOW_RANK, norm_lr=1e-2),
    "low_rank_f0.25": Run(mode=LOW_RANK | {"distill_fraction": 0.25}, norm_lr=3e-3),
    "low_rank_l0": Run(mode=LOW_RANK | {"distill_weight": 0.0}, norm_lr=3e-3),
    "low_rank_router1e-2": Run(mode=LOW_RANK, norm_lr=3e-3, router_lr=1e-2),
    "low_rank_router3e-2": Run(mode=LOW_RANK, norm_lr=3e-3, router_lr=3e-2),
    "low_rank_l0.1": Run(mode=LOW_RANK | {"distill_weight": 0.1}, norm_lr=3e-3),
    "low_rank_l0.1_router1e-2": Run(
        mode=LOW_RANK | {"distill_weight": 0.1}, norm_lr=3e-3, router_lr=1e-2
    ),
    "low_rank_l0_router1e-2": Run(
        mode=LOW_RANK | {"distill_weight": 0.0}, norm_lr=3e-3, router_lr=1e-2
    ),
    "low_rank_l0_p0.5": Run(
        mode=LOW_RANK | {"distill_weight": 0.0, "router_prior": 0.5}, norm_lr=3e-3
    ),
    "low_rank_l0.1_p0.5_router1e-2": Run(
        mode=LOW_RANK | {"distill_weight": 0.1, "router_prior": 0.5}, norm_lr=3e-3, router_lr=1e-2
    ),
    "lora_lr1e-3": Run(lr=1e-3),
    "lora_lr2e-3": Run(lr=2e-3),
    "low_rank_lora1e-3": Run(mode=LOW_RANK, norm_lr=3e-3, lr=1e-3),
    "low_rank_l0_lora1e-3": Run(
        mode=LOW_RANK | {"distill_weight": 0.0}, norm_lr=3e-3, router_lr=1e-2, lr=1e-3
    ),
    "low_rank_l0.1_lora1e-3": Run(
        mode=LOW_RANK | {"distill_weight": 0.1}, norm_lr=3e-3, router_lr=1e-2, lr=1e-3
    ),
    "low_rank_p0.98": Run(mode=LOW_RANK | {"router_prior": 0.98}, norm_lr=3e-3, router_lr=1e-2),
    "low_rank_p0.5": Run(mode=LOW_RANK | {"router_prior": 0.5}, norm_lr=3e-3),
    "last_low_rank_only": Run(
        mode=LOW_RANK | {"k": 2, "router_prior": 0.9999, "distill_weight": 0.0}, norm_lr=3e-3
    ),
    "norm_f0.25": Run(mode=NORM | {"distill_fraction": 0.25}, norm_lr=1e-2),
    "late": Run(late_only=True),
    "late_norm": Run(mode=NORM, late_only=True, norm_lr=1e-2),
    "late_affine": Run(mode=AFFINE, late_only=True),
    "late_low_rank": Run(mode=LOW_RANK, late_only=True, norm_lr=3e-3),
    "mode": Run(mode=NORM, lora=False, norm_lr=1e-2),
    "mode_affine": Run(mode=AFFINE, lora=False),
    "mode_low_rank": Run(mode=LOW_RANK, lora=False, norm_lr=3e-3),
}


def main() -> None:
    """Run the chosen settings, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="MAWPS in its raw JSON form")
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, default=list(RUNS), help="settings; all by default"
    )
    parser.add_argument("--out", type=Path, default=Path("router_defaults.jsonl"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    folder = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [as_texts(row) for row in json.loads(args.data.read_text())]
    rows = [row for row in rows if len(encode(row, tokenizer)[0]) <= 64]
    for seed in args.seeds:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
        held_out = [rows[i] for i in order[: args.held_out]]
        train = [rows[i] for i in order[args.held_out :][: args.steps * args.batch]]
        for name in args.runs:
            result = run(RUNS[name], folder, tokenizer, train, held_out, args.batch, seed)
            line = json.dumps({"run": name, "seed": seed, "steps": args.steps, **result})
            print(line, flush=True)
            with args.out.open("a") as out:
                out.write(line + "\n")


def as_texts(row: dict[str, Any]) -> dict[str, str]:
    """Return a question as prompt, its equation and answer as completion."""
    prompt = f"Question: {row['original_text'].strip()}\nEquation:"
    return {
        "prompt": prompt,
        "completion": f" {row['equation'].removeprefix('X=')}\nAnswer: {row['ans']}",
    }


def run(
    setting: Run,
    folder: Path,
    tokenizer: Any,
    train: list[dict[str, str]],
    held_out: list[dict[str, str]],
    batch: int,
    seed: int,
) -> dict[str, Any]:
    """Train one setting and score it on the held-out questions."""
    torch.manual_seed(seed)
    model = build(setting, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    groups = depthmix.param_groups(
        model, lr=setting.lr, router_lr=setting.router_lr, norm_lr=setting.norm_lr
    )
    optimizer = torch.optim.AdamW(groups)
    steps = len(train) // batch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 4, (steps - step) / (steps - 4))
    )
    model.train()
    began = time.perf_counter()
    warmup = (setting.mode or {}).get("router_warmup_steps", 0)
    for step in tqdm(range(steps)):
        if warmup:
            runtime_of(model).hold_router = step < warmup
        encoded = [encode(row, tokenizer) for row in train[step * batch : (step + 1) * batch]]
        inputs: Any = collate(encoded, model.device)
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - began
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    scores = score_rows(model, tokenizer, held_out, batch)
    return {
        "loss": round(scores.mean_loss, 4),
        "layers": [round(loss, 4) for loss in scores.layer_loss],
        "weights": [round(weight, 4) for weight in scores.gate],
        "entropy": scores.entropy,
        "seconds": round(seconds),
        "trainable": trainable,
    }


def build(setting: Run, model: Any) -> Any:
    """Attach what the setting asks for."""
    config = None if setting.mode is None else depthmix.MoDEConfig(**setting.mode)
    if not setting.lora:
        return depthmix.attach(model, config, mode_only_config())
    peft_config: PeftConfig = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if setting.late_only:
        peft_config = restricted(peft_config, discover(model, depthmix.MoDEConfig(k=3)), 3)
    if config is None:
        return get_peft_model(model, peft_config)
    return depthmix.attach(model, config, peft_config)


if __name__ == "__main__":
    main()
