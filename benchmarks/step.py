"""A whole training step on a real model: LoRA + MoDE against LoRA alone, both in plain HF Trainer.

    python benchmarks/step.py                      # the embedded 135M model
    python benchmarks/step.py --model NAME         # any other

Rows have the lengths of real GSM8K questions and answers (gsm8k_lengths.json); the question is
not supervised. `naive` is MoDE as one would write it, with k full logits tensors. Times are
medians of steps run in turn; the memory of each variant is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import depthmix
from measure import median_seconds, peak_bytes

LENGTHS = Path(__file__).with_name("gsm8k_lengths.json")
EMBEDDED = Path(__file__).parents[1] / "examples"
IGNORED = -100
VARIANTS = ("lora", "lora+mode", "lora+mode, all distilled", "naive")


def main() -> None:
    args = parse()
    if args.memory_of:
        print(peak_bytes(build(args.memory_of, args)))
        return
    names = [name for name in VARIANTS if name != "naive" or args.naive]
    peaks = {name: peak_in_a_process_of_its_own(name) for name in names}
    seconds = median_seconds({name: build(name, args) for name in names}, args.repeats)
    table = Table(title=f"one step of {args.batch} GSM8K rows, {torch.get_num_threads()} threads")
    for column in ("step", "seconds", "of lora", "peak MiB", "of lora"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name in names:
        table.add_row(
            name,
            f"{seconds[name]:.2f}",
            f"{seconds[name] / seconds['lora']:.2f}",
            f"{peaks[name] / 2**20:.0f}",
            f"{peaks[name] / peaks['lora']:.2f}",
        )
    Console().print(table)
    ratios = {
        "step_vs_hf_lora": seconds["lora+mode"] / seconds["lora"],
        "peak_vs_hf_lora": peaks["lora+mode"] / peaks["lora"],
    }
    print(json.dumps(ratios))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", help="default: the embedded model")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--naive", action="store_true", help="measure naive MoDE too")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.model is None:
        sys.path.insert(0, str(EMBEDDED))
        from embedded_model import embedded_model

        args.model = str(embedded_model())
    return args


def build(name: str, args: argparse.Namespace) -> Callable[[], Any]:
    """Return one training step of a variant, optimizer included."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    config = depthmix.MoDEConfig(k=args.k)
    if name == "lora+mode, all distilled":
        config = dataclasses.replace(config, distill_fraction=1.0)
    model = get_peft_model(model, lora) if name == "lora" else depthmix.attach(model, config, lora)
    with tempfile.TemporaryDirectory() as folder:
        trainer_class = NaiveTrainer if name == "naive" else Trainer
        trainer = trainer_class(model, TrainingArguments(folder, report_to=[]))
    optimizer = trainer.create_optimizer()
    model.train()
    batch = make_batch(args.batch, model.config.vocab_size, trainer.args.device)
    supervised = (batch["labels"][:, 1:] != IGNORED).sum()

    def step() -> None:
        trainer.training_step(model, dict(batch), supervised)
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_batch(size: int, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Random tokens in rows of real lengths, right padded, prompts not supervised."""
    lengths = json.loads(LENGTHS.read_text())[:size]
    width = max(question + answer for question, answer in lengths)
    ids = torch.randint(vocabulary, (size, width), generator=torch.Generator().manual_seed(0))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (question, answer) in enumerate(lengths):
        mask[i, : question + answer] = 1
        labels[i, question : question + answer] = ids[i, question : question + answer]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}


class NaiveTrainer(Trainer):
    """MoDE as one would write it: full logits of every late layer, autograd for the rest."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> torch.Tensor:
        labels = inputs.pop("labels")[:, 1:]
        runtime = model.get_base_model().depthmix_runtime
        states: list[torch.Tensor] = []
        handles = [
            model.get_base_model()
            .get_submodule(path)
            .register_forward_hook(lambda _m, _a, output: states.append(output))
            for path in runtime.anatomy.layer_paths
        ]
        model.get_base_model().model(**{k: v for k, v in inputs.items() if k != "labels"})
        for handle in handles:
            handle.remove()
        norm = model.get_base_model().model.norm
        normed = torch.stack([norm.forward(state) for state in states], dim=-2)
        layer_states, gate = runtime.mixture().weigh(normed)
        logits = model.get_base_model().lm_head(layer_states)[:, :-1].float()
        ensemble = (gate[:, :-1].unsqueeze(-1) * logits).sum(-2)
        loss = F.cross_entropy(ensemble.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        teacher = logits[..., -1, :].detach().log_softmax(-1)
        mask = labels != IGNORED
        for late in logits[..., :-1, :].log_softmax(-1).unbind(-2):
            kl = F.kl_div(late, teacher, log_target=True, reduction="none").sum(-1)
            loss = loss + (kl * mask).sum() / mask.sum() / (logits.shape[-2] - 1)
        return loss


def peak_in_a_process_of_its_own(name: str) -> int:
    command = [sys.executable, *sys.argv, "--memory-of", name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
