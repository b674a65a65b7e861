"""A conversation: its turns so far, and as many of them as the model can see."""

from __future__ import annotations

from typing import TYPE_CHECKING

from depthmix.errors import ConfigError
from depthmix.inference.form import Form, Message, encode_chat, opening

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Conversation:
    """Messages back and forth.

    Args:
        form: how the model is asked. In a form of single questions every message stands alone, as
            it did in training; otherwise the tokenizer's chat template holds all that was said.
        tokenizer: the model's tokenizer.
        room: tokens that the model can see of it; None: all.
        system: the system message.

    Attributes:
        dropped: messages that are no longer seen.
    """

    def __init__(
        self,
        form: Form,
        tokenizer: PreTrainedTokenizerBase,
        room: int | None,
        system: str | None = None,
    ) -> None:
        self.form = form
        self.system = system
        self.dropped = 0
        self._tokenizer = tokenizer
        self._room = room
        self._turns: list[Message] = []

    def reset(self) -> None:
        """Forget what was said; the system message stays."""
        self._turns.clear()
        self.dropped = 0

    def ask(self, said: str) -> list[int]:
        """Return the prompt of a message of the user's, the oldest turns dropped to make room.

        Raises:
            ConfigError: the message alone is too long; it is then not part of the conversation.
        """
        if self.form.is_question:
            return self._fitting(self.form.encode(said, self._tokenizer, self.system), said)
        turns = [*self._turns, {"role": "user", "content": said}]
        dropped = self.dropped
        while True:
            ids = encode_chat([*opening(self.system), *turns], self._tokenizer)
            if len(turns) == 1 or self._room is None or len(ids) <= self._room:
                break
            turns, dropped = turns[2:], dropped + 2
        ids = self._fitting(ids, said)
        self._turns, self.dropped = turns, dropped
        return ids

    def answered(self, answer: str) -> None:
        """Add the model's answer to the last message."""
        if not self.form.is_question:
            self._turns.append({"role": "assistant", "content": answer})

    def _fitting(self, ids: list[int], said: str) -> list[int]:
        if self._room is not None and len(ids) > self._room:
            raise ConfigError(
                f"a message of {len(said)} characters is too long: with what goes with it "
                f"{len(ids)} tokens, and there is room for {self._room}"
            )
        return ids
