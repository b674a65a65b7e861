"""`depthmix info`: what MoDE finds in a model and what would be trained, or what a folder holds."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.carry.saved_run import Holds, SavedRun
from depthmix.commands.budgets import print_budgets, side_by_side
from depthmix.commands.model_options import find_run
from depthmix.commands.parser import Parser
from depthmix.commands.train_help import LORA_HELP, add_texts, option_texts, with_defaults
from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError
from depthmix.pretrained import Loading, load_base, load_saved
from depthmix.train.arguments import adapter_options, split_own
from depthmix.train.given import Given, read_flags
from depthmix.train.options import options
from depthmix.train.run_options import RunOptions
from depthmix.train.typed import negated, typed

if TYPE_CHECKING:
    from torch import nn

    from depthmix.method.head import LogitTransform

_EXAMPLES = """\
examples:
  depthmix info HuggingFaceTB/SmolLM2-135M
  depthmix info HuggingFaceTB/SmolLM2-135M --k 4 --method lora --lora_r 8 --late_layers_only
  depthmix info out --json
"""
_METHOD = (
    *("method", "mode", "budget", "late_layers_only", "tuned_layers", "num_virtual_tokens"),
    "vera_r",
)


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    if not argv or "-h" in argv or "--help" in argv:
        _print_help()
        return 0 if argv else 2
    target = argv[0]
    if target.startswith("-"):
        raise ConfigError("the model or the adapter comes first: depthmix info MODEL [--key value]")
    given = read_flags(argv[1:])
    as_json = given.pop("json", None) is not None
    revision = given["revision"].text if "revision" in given else None
    saved = find_run(target, revision)
    tuned = saved.holds is not Holds.MODEL or saved.has_mode
    report = _saved(saved, given) if tuned else _planned(target, given)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print_tables(report)
    return 0


def _print_help() -> None:
    summary = "Show what MoDE finds in a model and would train, or what a saved folder holds."
    parser = Parser("info", summary, _EXAMPLES, usage="MODEL_OR_ADAPTER [--key value ...]")
    texts = {
        "output": {"json": "Print JSON."},
        "of an adapter": {"model": "Base model. Default: the one the adapter names."},
        "loading (default: as in training)": _LOADING_HELP,
        "of a model, what would be trained": {
            **option_texts(RunOptions, _METHOD),
            **with_defaults(LORA_HELP),
        },
        "MoDE": option_texts(MoDEConfig),
    }
    add_texts(parser, texts)
    parser.print_help()


def _planned(name: str, given: dict[str, Given]) -> dict[str, Any]:
    """Describe what training with these options would put on a base model."""
    from depthmix.train.methods import tune

    loading, given = _loading(given)
    run, mode, rest = split_own(given)
    for option in set(options(RunOptions)) - set(_METHOD):
        if option in given:
            raise ConfigError(f"{given[option].place}: has no meaning for depthmix info")
    model = tune(load_base(name, **loading.options()), run, mode, adapter_options(rest))
    what = {"model": name, "method": run.method, "with_mode": run.mode}
    size = None if run.method == "full" else _size_when_saved(model)
    report = _report(what, model, mode.to_dict() if run.mode else None, size)
    return {**report, "budgets": side_by_side(model, bool(loading.trust_remote_code))}


def _saved(saved: SavedRun, given: dict[str, Given]) -> dict[str, Any]:
    """Describe what `depthmix train` or `export` has written."""
    loading, given = _loading(given)
    surplus = [name for name in given if name != "model"]
    if surplus:
        place = given[surplus[0]].place
        raise ConfigError(f"{place}: {saved.name} is saved already; it has its own")
    base = str(given["model"].text) if given else None
    model = load_saved(saved, base, loading, is_trainable=True)
    what = {"model": base or saved.base, "with_mode": saved.has_mode}
    if saved.holds is Holds.ADAPTER:
        what["adapter"] = saved.name
    mode = _mode_config(model) if saved.has_mode else None
    return _report(what, model, mode, sum(path.stat().st_size for path in saved.weight_files))


_LOADING_HELP = {
    "revision": "Of the base model on the hub.",
    "trust_remote_code": "Run modelling code that comes with the weights.",
    "dtype": "Of the weights.",
    "load_in_4bit": "Quantise the base model while loading (needs bitsandbytes).",
}


def _loading(given: dict[str, Given]) -> tuple[Loading, dict[str, Given]]:
    """Return what is said of loading, and the other options."""
    known = {name: option for name, option in options(Loading).items() if name in _LOADING_HELP}
    given = negated(known, given)
    rest = {name: value for name, value in given.items() if name not in known}
    return Loading(**typed(known, given)), rest


def _mode_config(model: Any) -> dict[str, Any]:
    """Return the configuration of MoDE; of an export, what its own code reads."""
    from depthmix.model.active import host_of
    from depthmix.model.runtime import runtime_of

    exported = getattr(host_of(model).config, "depthmix", None)
    if exported is not None:
        return {name: value for name, value in exported.items() if name != "parameters"}
    mixture = runtime_of(model).mixture()
    assert mixture is not None
    return mixture.config.to_dict()


def _report(
    what: dict[str, Any], model: nn.Module, mode: dict[str, Any] | None, size: int | None
) -> dict[str, Any]:
    parts = _trainable_parts(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    return {
        **what,
        "modules": _modules(model),
        "parameters": {
            "total": total,
            "trainable": sum(parts.values()),
            "share": sum(parts.values()) / total,
            "parts": parts,
        },
        "saved_bytes": size,
        "config": mode,
    }


def _modules(model: nn.Module) -> dict[str, Any]:
    """Return where the parts of the model are, if MoDE is attached to it."""
    from depthmix.errors import DepthmixError
    from depthmix.model.runtime import runtime_of

    try:
        anatomy = runtime_of(model).anatomy
    except DepthmixError:
        return {}
    return {
        "layers": anatomy.layers_path,
        "late layers": list(anatomy.layer_indices),
        "final norm": anatomy.norm_path or "none",
        "head": anatomy.head_path,
        "scale before the head": anatomy.head_scale,
        "after the head": _in_words(anatomy.logit_transform),
    }


def _in_words(transform: LogitTransform) -> str:
    parts = [] if transform.scale == 1 else [f"times {transform.scale:g}"]
    if transform.cap is not None:
        parts.append(f"soft cap at {transform.cap:g}")
    return ", ".join(parts) or "nothing"


def _trainable_parts(model: nn.Module) -> dict[str, int]:
    """Return the number of trainable parameters by part: MoDE's, and by type of module."""
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[_part(name)] += parameter.numel()
    return dict(parts)


def _part(name: str) -> str:
    """Return the part that a parameter belongs to, going by its name."""
    path = name.split(".")
    if "depthmix" in path:
        return "MoDE router" if "router" in path else "MoDE norms and maps"
    if "prompt_encoder" in path:
        return "prompt"
    end = next((i for i, p in enumerate(path) if p.startswith(_TUNER_PREFIXES)), len(path) - 1)
    kind = path[end].partition("_")[0] if end < len(path) - 1 else ""
    module = next(p for p in reversed(path[:end]) if not p.isdigit() and p != "default")
    return f"{kind} {module}".strip()


_TUNER_PREFIXES = ("lora_", "vera_", "ia3_", "modules_to_save")


def _size_when_saved(model: Any) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return _weight_bytes(folder)


def _weight_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def _print_tables(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def show(title: str, rows: dict[str, Any], justify: Any = "left") -> None:
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify=justify, overflow="fold")
        for name, value in rows.items():
            table.add_row(name, str(value))
        console.print(table)

    names = [n for n in ("model", "adapter", "method", "with_mode") if n in report]
    show("Model", {**{name: report[name] for name in names}, **report["modules"]})
    counts = report["parameters"]
    rows = {name: f"{count:,}" for name, count in counts["parts"].items()}
    rows["all trainable"] = f"{counts['trainable']:,}"
    rows["of all parameters"] = f"{counts['total']:,} ({counts['share']:.3%})"
    if report["saved_bytes"] is not None:
        rows["saved size in bytes"] = f"{report['saved_bytes']:,}"
    show("Trainable parameters", rows, "right")
    if report["config"] is not None:
        show("MoDE", report["config"])
    if report.get("budgets"):
        print_budgets(report["budgets"])
