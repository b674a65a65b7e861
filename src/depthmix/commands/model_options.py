"""Options that commands share: which model, how it is loaded, how tokens are drawn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from depthmix.carry.saved_run import Holds, SavedRun
from depthmix.commands.parser import MOST_SEED, Parser, integer, number
from depthmix.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from depthmix.pretrained import Loading

TARGET_HELP = "folder of a tuned, exported or base model, or its name on the hub (NAME@REVISION)"


def add_model_options(parser: Parser, target: str = "target") -> None:
    """Add the arguments that name the model and say how it is loaded."""
    parser.add_argument(target, metavar="MODEL", help=TARGET_HELP)
    parser.add_argument(
        "--model", metavar="BASE", help="base model of an adapter (default: the one it names)"
    )
    add_loading_options(parser)


def add_loading_options(parser: Parser) -> None:
    """Add the arguments that overrule how training loaded the base model."""
    group = parser.add_argument_group("loading (default: as in training)")
    _add_base_options(group, "of the weights")
    group.add_argument(
        "--load-in-4bit",
        action=argparse.BooleanOptionalAction,
        help="quantise the base model while loading (needs bitsandbytes)",
    )


def add_base_options(parser: Parser, dtype: str = "of the weights") -> None:
    """Add the arguments that say how a base model is loaded; `dtype` is the help of `--dtype`."""
    _add_base_options(parser.add_argument_group("loading"), dtype)


def _add_base_options(group: argparse._ArgumentGroup, dtype: str) -> None:
    group.add_argument("--revision", metavar="REV", help="of the base model on the hub")
    group.add_argument(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        help="run modelling code that comes with the weights",
    )
    group.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], help=dtype)


def find_run(target: str, revision: str | None) -> SavedRun:
    """Find what a command is to use; a revision is that of a whole model, or an adapter's base.

    Raises:
        CheckpointError: there is nothing to use.
        ConfigError: the revision is of a folder, or a second one.
    """
    run = SavedRun.find(target)
    if revision is None or run.holds is Holds.ADAPTER:
        return run
    if run.commit is None:
        raise ConfigError(f"--revision: {target} is a folder, which has none")
    if run.repository != target:
        raise ConfigError(f"--revision: {target} names one already")
    return SavedRun.find(target, revision)


def loading(arguments: argparse.Namespace) -> Loading:
    """Return what was said of loading."""
    from depthmix.pretrained import Loading

    names = ("revision", "trust_remote_code", "dtype", "load_in_4bit")
    return Loading(**{name: value for name, value in vars(arguments).items() if name in names})


def base_config(arguments: argparse.Namespace) -> PretrainedConfig:
    """Return the configuration of the base model that `arguments.model` names.

    Raises:
        CheckpointError: there is nothing, or an adapter.
        DepthmixError: its configuration cannot be loaded.
    """
    from depthmix.pretrained import load_config, require_no_adapter

    saved = find_run(arguments.model, arguments.revision)
    require_no_adapter(saved)
    return load_config(
        arguments.model,
        revision=arguments.revision or "main",
        trust_remote_code=bool(arguments.trust_remote_code),
    )


def add_sampling_options(parser: Parser) -> None:
    """Add the arguments of sampling."""
    group = parser.add_argument_group("generation")
    add = group.add_argument
    add(
        "--max-new-tokens",
        type=integer(1),
        default=256,
        metavar="N",
        help="length limit (default: 256)",
    )
    add(
        "--temperature",
        type=number(0.0),
        default=0.0,
        metavar="T",
        help="0: always the likeliest token (default: 0)",
    )
    add(
        "--top-p",
        type=number(0.0, 1.0, above=True),
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens of this total probability (default: 1)",
    )
    add(
        "--seed",
        type=integer(0, MOST_SEED),
        default=0,
        metavar="N",
        help="of all samples of the run (default: 0)",
    )
    add("--show-routing", action="store_true", help="print the mean weight of each late layer")


def require_routing(run: SavedRun) -> None:
    """Raise `ConfigError` unless the routing of a model can be shown."""
    if run.holds is Holds.EXPORT:
        raise ConfigError(f"--show-routing: {run.name} is an export, which does not record it")
    if not run.has_mode:
        raise ConfigError(f"--show-routing: {run.name} holds no MoDE")


@contextmanager
def showing_routing(model: Any, wanted: bool = True) -> Iterator[None]:
    """Print the mean weight of each late layer over the block, if that is wanted."""
    import depthmix

    if not wanted:
        yield
        return
    with depthmix.routing(model) as record:
        yield
    weights = zip(record.layers, record.mean().tolist(), strict=True)
    listed = ", ".join(f"layer {layer}: {weight:.3f}" for layer, weight in weights)
    print(f"routing: {listed}", file=sys.stderr)
