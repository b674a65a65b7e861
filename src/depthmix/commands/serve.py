"""`depthmix serve`: a model behind OpenAI's interface."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from depthmix.carry.saved_run import Holds
from depthmix.commands.export import export
from depthmix.commands.model_options import add_model_options, find_run, loading
from depthmix.commands.parser import Parser, integer
from depthmix.errors import ConfigError

_EXAMPLES = """\
examples:
  depthmix serve tuned
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "tuned", "messages": [{"role": "user", "content": "What is 7 + 3?"}]}'
  depthmix serve tuned --engine vllm -- --max-model-len 4096

transformers answers one request after the other; vLLM, for many users, is given an export of the
model, and what stands behind `--`. The key of --api-key can be in DEPTHMIX_API_KEY instead.
"""


def run(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C."""
    ours, further = _split(list(argv))
    arguments = _parser().parse_args(ours)
    api_key = arguments.api_key or os.environ.get("DEPTHMIX_API_KEY")
    address = (arguments.host, arguments.port, api_key)
    saved = find_run(arguments.target, arguments.revision)
    if arguments.engine == "transformers":
        if further:
            raise ConfigError("--: arguments of an engine go with --engine vllm")
        from depthmix.serve.server import serve

        serve(saved, arguments.model, loading(arguments), *address)
        return 0
    from depthmix.serve.server import find_vllm, serve_by_vllm

    find_vllm()  # before anything is exported for nothing
    if saved.holds is Holds.EXPORT:
        return serve_by_vllm(saved.fetched(), saved.name, *address, further)
    with TemporaryDirectory(prefix="depthmix-") as parent:
        folder = Path(parent) / "exported"
        export(saved, arguments.model, loading(arguments), folder)
        print(f"note: exported for this run; `depthmix export {saved.name} OUT` keeps one")
        return serve_by_vllm(folder, saved.name, *address, further)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return our arguments, and those behind `--`."""
    if "--" not in argv:
        return argv, []
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def _parser() -> Parser:
    usage = "MODEL [options] [-- ARGUMENTS OF THE ENGINE]"
    parser = Parser("serve", "Serve a model by OpenAI's interface.", _EXAMPLES, usage)
    add_model_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="to listen on (default: 127.0.0.1, which this machine alone can reach)",
    )
    group.add_argument(
        "--port",
        type=integer(0, 65535),
        default=8000,
        metavar="N",
        help="to listen on; 0: a free one (default: 8000)",
    )
    group.add_argument(
        "--api-key", metavar="KEY", help="what requests must carry (default: nothing)"
    )
    group.add_argument(
        "--engine",
        choices=["transformers", "vllm"],
        default="transformers",
        help="what runs the model (default: transformers)",
    )
    return parser
