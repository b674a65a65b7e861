"""The loss of MoDE alone, against the naive one that holds the logits of all k layers.

    python benchmarks/loss.py

prints time (median) and peak memory of forward and backward, and the ratios. Every variant's
memory is measured in a process of its own, the times in turn within one process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from depthmix.head import LinearHead, LogitTransform
from depthmix.losses import ensemble_loss
from measure import median_seconds, peak_bytes


def main() -> None:
    args = parse()
    if args.memory_of:
        print(peak_bytes(variants(args)[args.memory_of]))
        return
    seconds = median_seconds(variants(args), args.repeats)
    peaks = {name: peak_in_a_process_of_its_own(name) for name in seconds}
    table = Table(
        title=f"{args.tokens} tokens, V = {args.vocabulary}, d = {args.width}, k = {args.k}, "
        f"{args.dtype}, {torch.get_num_threads()} threads"
    )
    for column in ("loss", "seconds", "of naive", "peak MiB", "of naive"):
        table.add_column(column, justify="left" if column == "loss" else "right")
    for name in seconds:
        table.add_row(
            name,
            f"{seconds[name]:.3f}",
            f"{seconds[name] / seconds['naive']:.2f}",
            f"{peaks[name] / 2**20:.0f}",
            f"{peaks[name] / peaks['naive']:.2f}",
        )
    Console().print(table)
    ratios = {
        "loss_time_vs_naive": seconds["depthmix"] / seconds["naive"],
        "loss_memory_vs_naive": peaks["depthmix"] / peaks["naive"],
    }
    print(json.dumps(ratios))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def variants(args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Return the two losses on the same random tensors, forward and backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    options = {"dtype": getattr(torch, args.dtype), "device": device}

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(**options)

    weight = random(args.vocabulary, args.width) * 0.05
    states = random(args.tokens, args.k, args.width).requires_grad_()
    gate = random(args.tokens, args.k).float().softmax(-1).requires_grad_()
    labels = torch.randint(args.vocabulary, (args.tokens,), generator=generator).to(device)

    def naive() -> Tensor:
        return naive_loss(states, gate, labels, weight)

    def fused() -> Tensor:
        head = LinearHead(weight, None)
        return ensemble_loss(states, gate, labels, head, LogitTransform(), 1.0).total

    def with_backward(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            states.grad = gate.grad = None
            total = loss()
            total.backward()
            return total

        return run

    return {"naive": with_backward(naive), "depthmix": with_backward(fused)}


def naive_loss(states: Tensor, gate: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The loss as one would write it: the logits of all layers at once, autograd for the rest."""
    logits = F.linear(states, weight).float()
    ensemble = (gate.unsqueeze(-1) * logits).sum(1)
    teacher = logits[:, -1].detach().log_softmax(-1)
    divergences = [
        F.kl_div(late.log_softmax(-1), teacher, log_target=True, reduction="sum")
        for late in logits[:, :-1].unbind(1)
    ]
    return F.cross_entropy(ensemble, labels, reduction="sum") + sum(divergences) / len(divergences)


def peak_in_a_process_of_its_own(name: str) -> int:
    command = [sys.executable, *sys.argv, "--memory-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
