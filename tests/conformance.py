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
from dataclasses import dataclass
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
from type_checks import CHECKS, IDS, K

DOCS = Path(__file__).parents[1] / "docs"
MOST_PARAMETERS = 10_000_000


@dataclass
class Result:
    """What came out for a type: ok, refused, failed or not built, and why."""

    status: str
    reason: str = ""


def check(model_type: str) -> Result:
    """Build a tiny model and run all checks."""
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
    for name, run in CHECKS.items():
        try:
            run(base, copy.deepcopy(model), expected)
        except DepthmixError as error:
            return Result("refused", f"{name}: {_short(error)}")
        except Exception as error:
            return Result("failed", f"{name}: {_short(error)}")
    return Result("ok")


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
    for name in arguments.types or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        results[name] = check(name)
        print(f"{name}: {results[name].status} {results[name].reason}", flush=True)
    counts = {s: sum(r.status == s for r in results.values()) for s in _STATES}
    print(counts)
    if not arguments.types:
        write(results, counts, arguments.out)


OK = """\
ok: with the gate on the last layer the logits are the base model's bit for bit; the mixture is the
gated sum of the heads; loss and gradients are the naive ones, and with the last layer alone and no
distillation the loss is the model's own, router logits on and off; eight threads and an exception
in mid-forward change nothing; LoRA that has learned nothing on the head changes nothing; exported
and loaded without depthmix, the logits are the same (or the export is refused: models in which
more than a final norm lies between layers and head); the cache and left padding change nothing
(where they change nothing for the base model); saved and loaded, the logits are the same.
refused: `attach` raises, with the reason."""
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
        + ".",
        "",
        OK,
        "",
        "| type | status | reason |",
        "|---|---|---|",
        *(f"| {n} | {r.status} | {r.reason.replace('|', '/')} |" for n, r in results.items()),
    ]
    (folder / "models.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
