"""`depthmix export`: a folder that transformers loads without depthmix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from depthmix.carry.run_record import CONFIG_NAME
from depthmix.carry.saved_run import Holds, SavedRun
from depthmix.commands.model_options import add_model_options, find_run, loading
from depthmix.commands.parser import Parser
from depthmix.errors import CheckpointError
from depthmix.files import write_text

if TYPE_CHECKING:
    from depthmix.pretrained import Loading

_EXAMPLES = """\
examples:
  depthmix export tuned exported
  python -c "from transformers import AutoModelForCausalLM as A; \\
      A.from_pretrained('exported', trust_remote_code=True)"

The tuning method is merged into the weights. vLLM serves the folder; llama.cpp and TensorRT-LLM,
which do not run a model's own code, cannot: see docs/serving.md.
"""


def run(argv: Sequence[str]) -> int:
    """Load, merge and write."""
    arguments = _parser().parse_args(argv)
    out = Path(arguments.out)
    export(find_run(arguments.target, arguments.revision), arguments.model, loading(arguments), out)
    print(
        f"exported to {out}; load it with "
        f"AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)"
    )
    return 0


def export(saved: SavedRun, base: str | None, how: Loading, out: Path) -> None:
    """Write the folder of a tuned model, with the record by which it is asked as it was trained.

    Raises:
        CheckpointError: it is an export, or holds no MoDE.
        DepthmixError: it cannot be exported; see `export_model`.
    """
    if saved.holds is Holds.EXPORT:
        raise CheckpointError(f"{saved.name}: is an export already")
    if not saved.has_mode:
        raise CheckpointError(f"{saved.name}: holds no MoDE")
    from depthmix.export.folder import export_model
    from depthmix.inference.form import Form
    from depthmix.inference.loading import load_for_use

    model, tokenizer = load_for_use(saved, Form.of(saved), base, how)
    export_model(model, tokenizer, out)
    if saved.record.options:
        write_text(out / CONFIG_NAME, yaml.safe_dump(saved.record.options, sort_keys=False))


def _parser() -> Parser:
    parser = Parser("export", "Write a folder that transformers loads without depthmix.", _EXAMPLES)
    add_model_options(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    return parser
