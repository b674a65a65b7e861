"""`depthmix plan`: what tuning a model takes, before it is downloaded or a GPU is rented."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from depthmix.commands.model_options import add_base_options, base_config, loading
from depthmix.commands.parser import Parser, integer, name_or_folder, number

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from depthmix.plan.report import Plan

_EXAMPLES = """\
examples:
  depthmix plan meta-llama/Meta-Llama-3-8B --gpu h100
  depthmix plan meta-llama/Meta-Llama-3-70B --gpus 8 --sharding fsdp --length 2048 --memory 80GiB
  depthmix plan HuggingFaceTB/SmolLM2-135M-Instruct --check

lora: on all layers; half: on the upper half; light: of rank 1 on the upper half; late-lora: on the
k late layers; +mode, mode: MoDE with it, or alone; full: every parameter is trained.

Only the configuration of the model is read. Assumed is what `depthmix train` does on a GPU by
default: a frozen base in bf16, adapters in fp32, gradient checkpointing where more than the k late
layers are tuned. --check measures a training step on this machine, which loads the weights, and
prints how far off the prediction is.
"""


def run(argv: Sequence[str]) -> int:
    """Count and print."""
    arguments = _parser().parse_args(argv)
    config = base_config(arguments)
    plan = _plan(arguments, config)
    if arguments.json:
        print(json.dumps(plan.as_dict(), indent=1))
    else:
        plan.print()
    if arguments.check:
        _check(arguments, config)
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
    add(
        "--tuned-layers",
        type=_tuned_layers,
        help="one more row: LoRA on so many of the last layers (10, 0.25, half)",
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
        "--attn-implementation",
        choices=["sdpa", "eager"],
        help="of attention; eager holds its scores (default: as transformers chooses)",
    )
    add("--no-checkpointing", action="store_true", help="keep all activations")
    add("--gpus", type=integer(1), default=1, help="number of devices (default: 1)")
    add("--sharding", choices=["none", "fsdp"], default="none", help="of weights over devices")
    add_base_options(parser, "of a frozen base, and of the arithmetic (default: bfloat16)")
    card = parser.add_mutually_exclusive_group()
    card.add_argument("--gpu", help="say whether it fits this card: t4, l4, a100, h100, ...")
    card.add_argument(
        "--memory", type=_size, help="say whether it fits a device of this memory, such as 24GiB"
    )
    add(
        "--cached-tokens",
        type=integer(1, 2**63),
        default=10**6,
        help="training tokens, for the cache's size",
    )
    add("--check", action="store_true", help="measure a step here and print the error")
    add("--json", action="store_true", help="print JSON")
    return parser


def _tuned_layers(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text  # a word, or what `count_of` refuses


def _size(text: str) -> int:
    from depthmix.plan.cards import read_size

    try:
        return read_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _dtype(name: str, config: PretrainedConfig) -> torch.dtype:
    """Return the dtype of a name; auto is that of the weights."""
    import torch

    if name != "auto":
        named: torch.dtype = getattr(torch, name)
        return named
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _plan(arguments: argparse.Namespace, config: PretrainedConfig) -> Plan:
    from depthmix.plan.cards import memory_of
    from depthmix.plan.methods import METHODS, Method
    from depthmix.plan.profile import Setting
    from depthmix.plan.report import Plan, count

    memory = memory_of(arguments.gpu) if arguments.gpu else arguments.memory
    methods = dict(METHODS)
    if arguments.tuned_layers is not None:
        methods[f"tuned {arguments.tuned_layers}"] = Method("lora", arguments.tuned_layers)
    setting = Setting(
        rows=arguments.rows,
        length=arguments.length,
        supervised=arguments.supervised,
        dtype=_dtype(arguments.dtype or "bfloat16", config),
        attention=arguments.attn_implementation,
        gpus=arguments.gpus,
        sharded=arguments.sharding == "fsdp",
        trust_remote_code=bool(arguments.trust_remote_code),
    )
    counted = count(
        config,
        setting,
        methods,
        k=arguments.k,
        rank=arguments.lora_r,
        adapter=default_lora,
        checkpointing=_checkpointing(arguments),
    )
    return Plan(
        model=arguments.model,
        card=arguments.gpu,
        device_memory=memory,
        cached_tokens=arguments.cached_tokens,
        counted=counted,
    )


def default_lora(rank: int) -> Any:
    """Return LoRA as `train` makes it by default."""
    from trl.trainer.model_config import ModelConfig

    from depthmix.train.methods import peft_config
    from depthmix.train.run_options import RunOptions

    return peft_config(RunOptions(method="lora"), ModelConfig(lora_r=rank))


def _checkpointing(arguments: argparse.Namespace) -> Callable[[Any], bool]:
    """Return for which methods `train` makes activations again by default, on a GPU."""
    from depthmix.train.run_options import RunOptions

    def default(method: Any) -> bool:
        run = RunOptions(method=method.tuning, late_layers_only=method.depth == "k")
        return not arguments.no_checkpointing and run.tunes_many_layers

    return default


def _check(arguments: argparse.Namespace, config: PretrainedConfig) -> None:
    """Measure the peak of a step with rows of that length and print the error."""
    from peft import LoraConfig

    from depthmix.bench.measure import in_fresh_process
    from depthmix.bench.training import Setting as Measured
    from depthmix.bench.training import first_step_allocation
    from depthmix.plan.methods import METHODS
    from depthmix.plan.profile import Setting
    from depthmix.plan.report import count
    from depthmix.tables import print_figures

    names = ("lora+mode", "late-lora+mode", "mode")
    counted = count(
        config,
        Setting(
            rows=arguments.rows,
            length=arguments.length,
            supervised=arguments.supervised,
            dtype=_dtype(arguments.dtype or "auto", config),  # in which the weights are loaded
            mixed=False,
            trust_remote_code=bool(arguments.trust_remote_code),
        ),
        {name: METHODS[name] for name in names},
        k=arguments.k,
        rank=16,
        adapter=lambda rank: LoraConfig(r=rank, target_modules="all-linear"),
        checkpointing=lambda _: False,
    )
    answer = round(arguments.length * arguments.supervised)
    lengths = [(arguments.length - answer, answer)] * arguments.rows
    rows = []
    for name in names:
        setting = Measured(arguments.model, lengths, arguments.k, loading(arguments))
        measured = in_fresh_process(first_step_allocation, name, setting)
        predicted = counted.bills[name].memory.step
        figures = (f"{predicted / 2**20:.0f}", f"{measured / 2**20:.0f}")
        rows.append((name, *figures, f"{predicted / measured - 1:+.0%}"))
    header = ("method", "predicted MiB", "measured MiB", "error")
    print_figures("a step, beside weights and optimiser states", header, rows)
