"""`depthmix export`: a folder that transformers loads without depthmix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from depthmix.carry.run_record import CONFIG_NAME
from depthmix.carry.saved_run import Holds
from depthmix.commands.model_options import add_model_options, find_run, loading
from depthmix.commands.parser import Parser
from depthmix.errors import CheckpointError
from depthmix.files import write_text

_EXAMPLES = """\
examples:
  depthmix export tuned exported
  python -c "from transformers import AutoModelForCausalLM as A; \\
      A.from_pretrained('exported', trust_remote_code=True)"

The tuning method is merged into the weights. Engines that do not run the model's own code (vLLM,
llama.cpp, TensorRT-LLM) cannot serve the folder; see docs/export.md.
"""


def run(argv: Sequence[str]) -> int:
    """Load, merge and write."""
    arguments = _parser().parse_args(argv)
    saved = find_run(arguments.target, arguments.revision)
    if saved.holds is Holds.EXPORT:
        raise CheckpointError(f"{saved.name}: is an export already")
    if not saved.has_mode:
        raise CheckpointError(f"{saved.name}: holds no MoDE")
    from depthmix.export.folder import export_model
    from depthmix.inference.form import Form
    from depthmix.inference.loading import load_for_use

    model, tokenizer = load_for_use(saved, Form.of(saved), arguments.model, loading(arguments))
    export_model(model, tokenizer, Path(arguments.out))
    if saved.record.options:  # by which generate, chat and eval ask it as it was trained
        text = yaml.safe_dump(saved.record.options, sort_keys=False)
        write_text(Path(arguments.out) / CONFIG_NAME, text)
    print(
        f"exported to {arguments.out}; load it with "
        f"AutoModelForCausalLM.from_pretrained({arguments.out!r}, trust_remote_code=True)"
    )
    return 0


def _parser() -> Parser:
    parser = Parser("export", "Write a folder that transformers loads without depthmix.", _EXAMPLES)
    add_model_options(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    return parser
