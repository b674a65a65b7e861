"""`depthmix cache`: list or clear what tuning from cached depth left on disk."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from depthmix.commands.parser import Parser
from depthmix.errors import ConfigError

_EXAMPLES = """\
examples:
  depthmix cache list
  depthmix cache clear                     all of them
  depthmix cache clear 3f2a9c0d1b7e4a55    one
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = _parser().parse_args(argv)
    from depthmix.cache.depth import default_folder
    from depthmix.cache.store import cached_bytes

    folder = Path(arguments.cache_dir) if arguments.cache_dir else default_folder()
    sizes = cached_bytes(folder)
    unknown = sorted(set(arguments.names) - set(sizes))
    if unknown:
        raise ConfigError(f"{folder} holds no cache {', '.join(unknown)}")
    for name in arguments.names or list(sizes):
        if arguments.action == "clear":
            shutil.rmtree(folder / name)
        print(f"{name}  {sizes[name] / 2**20:.1f} MiB{_DONE[arguments.action]}")
    if not sizes:
        print(f"{folder}: no caches")
    return 0


_DONE = {"list": "", "clear": "  removed"}


def _parser() -> Parser:
    parser = Parser("cache", "List or clear cached states of frozen layers.", _EXAMPLES)
    parser.add_argument("action", choices=list(_DONE), help="what to do")
    parser.add_argument("names", nargs="*", metavar="NAME", help="caches (default: all)")
    parser.add_argument("--cache-dir", metavar="FOLDER", help="default: ~/.cache/depthmix")
    return parser
