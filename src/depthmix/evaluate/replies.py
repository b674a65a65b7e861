"""The replies so far, so that a run that was stopped goes on from them.

lm-eval's own cache holds pickles, which run whatever was put into them; these are lines of JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM, CachingLM


class ReplyFile(dict[str, Any]):
    """A mapping that appends every new entry to a file, a line each, and starts from what it holds.

    A line that is not whole, as where a run was killed, is left out and its reply made anew.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if self._keep(line)]
        if len(whole) < len(lines):
            temporary = path.with_suffix(".tmp")
            temporary.write_bytes(b"".join(whole))
            temporary.replace(path)

    def _keep(self, line: bytes) -> bool:
        """Take over the entry in a line; False if there is none."""
        try:
            key, reply = json.loads(line)
        except (ValueError, TypeError):  # no JSON, or not two values
            return False
        if not isinstance(key, str) or not line.endswith(b"\n"):
            return False
        super().__setitem__(key, reply)
        return True

    def __setitem__(self, key: str, reply: Any) -> None:
        """Keep a reply, which is text or a list or tuple of numbers."""
        if key in self:
            return
        with self._path.open("ab") as file:
            file.write(json.dumps([key, reply]).encode() + b"\n")
        super().__setitem__(key, reply)

    def commit(self) -> None:
        """Do nothing: every entry is written at once."""


class ReplyingLM(CachingLM):  # type: ignore[misc]
    """lm-eval's model with a cache, on a `ReplyFile`."""

    def __init__(self, lm: LM, replies: ReplyFile) -> None:
        self.lm = lm
        self.dbdict: Any = replies
        self.cache_db = "replies"
        lm.set_cache_hook(self.get_cache_hook())


LM.register(ReplyingLM)  # as lm-eval takes its own CachingLM for one
