"""`depthmix plan`: what tuning a model takes, before it is downloaded or a GPU is rented."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from depthmix.carry.saved_run import SavedRun
from depthmix.commands.parser import Parser, integer, name_or_folder, number
from depthmix.errors import ConfigError

if TYPE_CHECKING:
    from depthmix.plan.memory import Batch, Bill

_EXAMPLES = """\
examples:
  depthmix plan meta-llama/Llama-2-70b-hf --gpus 8 --sharding fsdp --rows 1 --length 2048
  depthmix plan HuggingFaceTB/SmolLM2-135M-Instruct --dtype float32 --check

Only the configuration of the model is read. --check measures a training step on this machine, which
loads the weights, and prints how far off the prediction is.
"""

_GIB = 2**30


def run(argv: Sequence[str]) -> int:
    """Count and print."""
    arguments = _parser().parse_args(argv)
    batch, trunks, bills = _plan(arguments)
    if arguments.json:
        print(json.dumps({name: asdict(bill) for name, bill in bills.items()}, indent=1))
    else:
        _print(arguments, batch, trunks, bills)
    if arguments.check:
        _check(arguments, bills)
    return 0


def _parser() -> Parser:
    parser = Parser("plan", "Tell what tuning a model takes, from its configuration.", _EXAMPLES)
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        type=name_or_folder,
        help="folder or hub name; its weights are not loaded",
    )
    add("--k", type=integer(1), default=3, help="late layers (default: 3)")
    add(
        "--lora-r",
        type=integer(1),
        default=16,
        help="rank of LoRA on all linear layers (default: 16)",
    )
    add("--rows", type=integer(1), default=1, help="rows of a batch on each device (default: 1)")
    add("--length", type=integer(1), default=1024, help="tokens of a row (default: 1024)")
    add(
        "--supervised",
        type=number(0, 1, above=True),
        default=0.5,
        help="share that is supervised (default: 0.5)",
    )
    add(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="of weights"
    )
    add("--gpus", type=integer(1), default=1, help="number of devices (default: 1)")
    add("--sharding", choices=["none", "fsdp"], default="none", help="of weights over devices")
    add(
        "--cached-tokens",
        type=integer(1, 2**63),
        default=10**6,
        help="training tokens, for the cache's size",
    )
    add("--check", action="store_true", help="measure a step here and print the error")
    add("--json", action="store_true", help="print JSON")
    return parser


def _plan(arguments: argparse.Namespace) -> tuple[Batch, dict[str, Any], dict[str, Bill]]:
    import torch
    from tqdm import tqdm
    from transformers import AutoConfig

    from depthmix.config import MoDEConfig
    from depthmix.plan.memory import METHODS, Batch, bill
    from depthmix.plan.trunk import TUNINGS, Step, count_trunk
    from depthmix.pretrained import require_no_adapter

    require_no_adapter(SavedRun.find(arguments.model))
    try:
        config = AutoConfig.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {arguments.model}: no configuration: {error}") from error
    dtype = getattr(torch, arguments.dtype)
    mode = MoDEConfig(k=arguments.k)
    shards = arguments.gpus if arguments.sharding == "fsdp" else 1
    batch = Batch(arguments.rows, arguments.length, arguments.supervised, dtype, shards)
    step = Step(arguments.rows, arguments.length, arguments.k, arguments.lora_r, dtype)
    trunks = {
        method: count_trunk(config, method, step)
        for method in tqdm(TUNINGS, desc="counting", unit="method", leave=False)
    }
    bills = {
        name: bill(trunks[trunk], mode if with_mode else None, batch)
        for name, (trunk, with_mode) in METHODS.items()
    }
    return batch, trunks, bills


def _print(
    arguments: argparse.Namespace, batch: Batch, trunks: dict[str, Any], bills: dict[str, Bill]
) -> None:
    from depthmix.tables import print_figures

    trunk = trunks["none"]
    print(f"{arguments.model}: {trunk.parameters:,} parameters, {arguments.dtype}")
    print_figures(
        "what is trained, and saved; a training step's arithmetic",
        ("method", "trained", "adapter, MiB", "GFLOP a token"),
        [
            (
                name,
                f"{bill.trained / 1e6:,.2f} M",
                f"{bill.adapter_bytes / 2**20:,.1f}",
                f"{bill.train_flops / 1e9:,.2f}",
            )
            for name, bill in bills.items()
        ],
    )
    parts = ("weights", "gradients", "optimizer", "activations", "loss", "total")
    print_figures(
        f"GiB on each of {arguments.gpus} devices ({arguments.sharding} sharding), "
        f"{batch.rows} x {batch.length} tokens",
        ("method", "weights", "gradients", "optimizer", "activations", "loss", "total"),
        [
            (name, *(f"{getattr(bill, part) / _GIB:,.2f}" for part in parts))
            for name, bill in bills.items()
        ],
    )
    cached = arguments.cached_tokens * trunk.width * batch.dtype.itemsize
    lora, ours = bills["lora"], bills["lora+mode"]
    print(
        f"decoding: {lora.decode_flops / 1e9:.2f} GFLOP a token, with MoDE "
        f"{ours.decode_flops / lora.decode_flops:.4f} times that"
    )
    print(f"keys and values: {trunk.kv_bytes / _GIB:.2f} GiB for this batch")
    print(f"cached depth: {cached / _GIB:.2f} GiB on disk for {arguments.cached_tokens:,} tokens")


def _check(arguments: argparse.Namespace, bills: dict[str, Bill]) -> None:
    """Measure the peak of a step with rows of that length and print the error."""
    from depthmix.bench.measure import in_fresh_process
    from depthmix.bench.training import Setting, first_step_peak
    from depthmix.tables import print_figures

    answer = round(arguments.length * arguments.supervised)
    lengths = [(arguments.length - answer, answer)] * arguments.rows
    setting = Setting(arguments.model, lengths, arguments.k)
    rows = []
    for name in ("lora", "lora+mode", "late-lora+mode", "mode"):
        measured = in_fresh_process(first_step_peak, name, setting)
        predicted = bills[name].step_bytes
        found = (
            name,
            f"{predicted / 2**20:.0f}",
            f"{measured / 2**20:.0f}",
            f"{predicted / measured - 1:+.0%}",
        )
        rows.append(found)
    header = ("method", "predicted MiB", "measured MiB", "error")
    print_figures("a step beside weights", header, rows)
