"""`depthmix export`: a folder that transformers loads without depthmix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from depthmix.commands.parser import Parser
from depthmix.errors import CheckpointError
from depthmix.pretrained import has_mode, load_tuned

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
    if Path(arguments.adapter).is_dir() and not has_mode(arguments.adapter):
        raise CheckpointError(f"{arguments.adapter}: holds no MoDE")
    model, tokenizer = load_tuned(arguments.adapter, arguments.model)
    from depthmix.export.folder import export_model

    export_model(model, tokenizer, Path(arguments.out))
    print(
        f"exported to {arguments.out}; load it with "
        f"AutoModelForCausalLM.from_pretrained({arguments.out!r}, trust_remote_code=True)"
    )
    return 0


def _parser() -> Parser:
    parser = Parser("export", "Write a folder that transformers loads without depthmix.", _EXAMPLES)
    parser.add_argument("adapter", metavar="ADAPTER", help="output folder of `depthmix train`")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    parser.add_argument("--model", metavar="NAME", help="base model, if not the one it names")
    return parser
