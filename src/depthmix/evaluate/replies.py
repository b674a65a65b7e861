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

    The last line, if a run was killed while writing it, is left out and written over.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            if line.endswith(b"\n"):
                key, reply = json.loads(line)
                super().__setitem__(key, reply)
                whole += len(line)
        with path.open("ab") as file:
            file.truncate(whole)

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
