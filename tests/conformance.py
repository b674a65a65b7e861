"""Check MoDE on every type of causal language model that the installed transformers has.

    python tests/conformance.py        # minutes; writes docs/models.json and docs/models.md

A tiny random model of each type is built from its configuration. `ok` means that all checks hold;
`refused`, that `attach` raised a DepthmixError; anything else is a failure of ours. Types that
cannot be built tiny here are listed apart, with the reason.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import depthmix
from depthmix.errors import DepthmixError
from models import PLAIN, randomise
from tiny_types import tiny_config
from type_checks import CHECKS, IDS, K, exported
from without_depthmix import without_depthmix

DOCS = Path(__file__).parents[1] / "docs"
MOST_PARAMETERS = 10_000_000


@dataclass
class Result:
    """What came out for a type: ok, refused, failed or not built, and why; of an export apart."""

    status: str
    reason: str = ""
    export: str = ""


def check(model_type: str, ask: Callable[[Path], dict]) -> Result:
    """Build a tiny model and run all checks; `ask` a process without depthmix for the export."""
    torch.manual_seed(0)
    try:
        config = tiny_config(model_type)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > MOST_PARAMETERS:
            return Result("not built", f"has {size:,} parameters by the usual names")
        base = AutoModelForCausalLM.from_config(config).float().eval()
        randomise(base)
        with torch.no_grad():
            expected = base(input_ids=IDS).logits
            if not torch.equal(expected, base(input_ids=IDS).logits):
                return Result("not built", "the base model is not deterministic")
    except Exception as error:
        return Result("not built", _short(error))
    try:
        model = depthmix.attach(copy.deepcopy(base), depthmix.MoDEConfig(k=K, **PLAIN))
    except DepthmixError as error:
        return Result("refused", _short(error))
    export = ""
    for name, run in {**CHECKS, "export": partial(exported, ask=ask)}.items():
        try:
            export = run(base, copy.deepcopy(model), expected)
        except DepthmixError as error:
            return Result("refused", f"{name}: {_short(error)}")
        except Exception as error:
            return Result("failed", f"{name}: {_short(error)}")
    return Result("ok", export=export)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    prefix = (
        "" if isinstance(error, (DepthmixError, AssertionError)) else f"{type(error).__name__}: "
    )
    return (prefix + text)[:200]


def main() -> None:
    """Check all types and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("types", nargs="*", help="default: all that transformers maps")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of models.json, models.md")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    results: dict[str, Result] = {}
    with without_depthmix() as ask:
        for name in arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            results[name] = result = check(name, ask)
            print(f"{name}: {result.status} {result.reason} {result.export}", flush=True)
    counts = {s: sum(r.status == s for r in results.values()) for s in _STATES}
    print(counts)
    if not arguments.types:
        write(results, counts, arguments.out)


OK = """\
ok: with the gate on the last layer the logits are the base model's bit for bit; the mixture is the
gated sum of the heads; loss and gradients are the naive ones, and with the last layer alone and no
distillation the loss is the model's own, router logits on and off; eight threads and an exception
in mid-forward change nothing; LoRA that has learned nothing on the head changes nothing; the cache
and left padding change nothing (where they change nothing for the base model); saved and loaded,
the logits are the same. refused: `attach` raises, with the reason.

export: whether `depthmix export` writes the type. yes: where depthmix cannot be imported, the
folder gives the logits, the tokens generated with a cache and after left padding, and the logits
in bfloat16 that the model gives. Other types are refused by name."""
_STATES = ("ok", "refused", "failed", "not built")


def write(results: dict[str, Result], counts: dict[str, int], folder: Path) -> None:
    """Write models.json with what was tested, and a table of everything."""
    tested = {n: vars(r) for n, r in results.items() if r.status != "not built"}
    (folder / "models.json").write_text(json.dumps(tested, indent=1) + "\n")
    lines = [
        "# Models",
        "",
        f"Types of transformers {transformers.__version__}, each checked as a "
        "tiny random model by `make models`: "
        + ", ".join(f"{count} {state}" for state, count in counts.items())
        + f". {sum(r.export == 'yes' for r in results.values())} are exported.",
        "",
        OK,
        "",
        "| type | status | export | reason |",
        "|---|---|---|---|",
        *(f"| {n} | {r.status} | {_brief(r.export)} | {_reason(r)} |" for n, r in results.items()),
    ]
    (folder / "models.md").write_text("\n".join(lines) + "\n")


def _brief(export: str) -> str:
    return export.partition(":")[0]


def _reason(result: Result) -> str:
    return (result.reason or result.export.partition(": ")[2]).replace("|", "/")


if __name__ == "__main__":
    main()
