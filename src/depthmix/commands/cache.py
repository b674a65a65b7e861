"""`depthmix cache`: list or clear what tuning from cached depth left on disk."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from depthmix.commands.parser import Parser, folder
from depthmix.errors import ConfigError

_EXAMPLES = """\
Only folders that depthmix made are listed or removed; `clear` lists them first, and asks.

examples:
  depthmix cache list
  depthmix cache clear                     all of them
  depthmix cache clear 3f2a9c0d1b7e4a55    one
  depthmix cache clear --yes               without asking, for scripts
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = _parser().parse_args(argv)
    from depthmix.cache.depth import default_folder
    from depthmix.cache.folder import cached_bytes

    home = arguments.cache_dir or default_folder()
    sizes = cached_bytes(home)
    unknown = sorted(set(arguments.names) - set(sizes))
    if unknown:
        raise ConfigError(f"{home} holds no cache {', '.join(unknown)}")
    chosen = {name: sizes[name] for name in arguments.names or sizes}
    if not chosen:
        print(f"{home}: no caches")
        return 0
    for name, size in chosen.items():
        print(f"{name}  {_mib(size)}")
    if arguments.action == "list":
        return 0
    if not arguments.yes and not _agreed(home, chosen):
        print("nothing was removed")
        return 1
    return _clear(home, chosen)


def _clear(home: Path, chosen: Mapping[str, int]) -> int:
    from depthmix.cache.folder import remove_cache

    for name in chosen:
        others = remove_cache(home / name)
        kept = f"; {home / name} stays, it holds {', '.join(others)}" if others else ""
        print(f"{name}  removed{kept}")
    return 0


def _agreed(home: Path, chosen: Mapping[str, int]) -> bool:
    """Ask at a terminal; elsewhere nobody can answer."""
    if not sys.stdin.isatty():
        raise ConfigError("clear asks before it removes: run it at a terminal, or add --yes")
    total = _mib(sum(chosen.values()))
    answer = input(f"remove {len(chosen)} of {home}, {total}? [y/N] ")
    return answer.strip().lower() in ("y", "yes")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _parser() -> Parser:
    parser = Parser("cache", "List or clear cached states of frozen layers.", _EXAMPLES)
    parser.add_argument("action", choices=["list", "clear"], help="what to do")
    parser.add_argument("names", nargs="*", metavar="NAME", help="caches (default: all)")
    parser.add_argument(
        "--cache-dir", type=folder, metavar="FOLDER", help="default: ~/.cache/depthmix"
    )
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    return parser
