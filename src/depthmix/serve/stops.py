"""Stop texts: a reply ends in front of the first one, as OpenAI's interface has it.

transformers stops there as well, but leaves the text in the reply.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any


def up_to(text: str, stops: Sequence[str]) -> str:
    """Return what is in front of the first stop text."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]


class Pieces:
    """The pieces of a reply that is sent as it comes, up to the first stop text.

    What may be the beginning of one is held back until it is known. Other items of the queue (its
    end, errors, calls of tools) come after the text before them.

    Args:
        queue: of the whole reply.
        stops: stop texts.
    """

    def __init__(self, queue: asyncio.Queue[Any], stops: Sequence[str]) -> None:
        self._queue, self._stops = queue, stops
        self._held, self._ended = "", False
        self._ready: deque[Any] = deque()

    async def get(self) -> Any:
        """Return the next item, when there is one."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        """Return the next item.

        Raises:
            asyncio.QueueEmpty: there is none yet.
        """
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.popleft()

    def _take(self, item: Any) -> None:
        if type(item) is not str:  # of a subclass is what a model thinks before it replies
            self._give(self._held)
            self._held = ""
            self._ready.append(item)
        elif not self._ended:
            text = self._held + item
            before = up_to(text, self._stops)
            self._ended = before != text
            held = 0 if self._ended else self._beginning(text)
            self._held = text[len(text) - held :]
            self._give(before[: len(before) - held])

    def _give(self, text: str) -> None:
        if text:
            self._ready.append(text)

    def _beginning(self, text: str) -> int:
        """Return how many of the last characters are the beginning of a stop text."""
        return max(
            (n for stop in self._stops for n in range(len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
