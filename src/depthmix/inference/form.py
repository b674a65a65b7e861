"""How training put a prompt to the model: the form that generating and scoring keep to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthmix.data.formats import FORMATS, conversational, prompt_for
from depthmix.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from depthmix.carry.saved_run import SavedRun

Message = dict[str, str]

_ANSWER = "depthmix-answer"


@dataclass(frozen=True)
class Form:
    """The form of a prompt.

    Attributes:
        row_format: key of `depthmix.data.formats.FORMATS`.
        template: key of `TEMPLATES`; None for the format's own.
    """

    row_format: str = "text"
    template: str | None = None

    @classmethod
    def of(cls, run: SavedRun, row_format: str | None = None) -> Form:
        """Return the form that a run was trained on, or that of other rows if a format is given.

        A model without a record is asked in plain text.
        """
        if row_format is not None:
            return cls(row_format)
        recorded = run.record.row_format or "text"
        if recorded not in FORMATS:
            raise CheckpointError(
                f"{run.name}: recorded as tuned on rows of format {recorded!r}, which is unknown"
            )
        return cls(recorded, run.record.template)

    @property
    def is_chat(self) -> bool:
        """Whether prompts are messages in the tokenizer's chat template."""
        return conversational(self.row_format)

    @property
    def is_question(self) -> bool:
        """Whether prompts are questions in a template of ours."""
        return FORMATS[self.row_format].read is not None

    def encode(
        self, prompt: str, tokenizer: PreTrainedTokenizerBase, system: str | None = None
    ) -> list[int]:
        """Return the token ids that a training row with this prompt begins with.

        Raises:
            ConfigError: a system message where there are no messages, or no chat template.
        """
        self.require_takes(system)
        if self.is_chat:
            return encode_chat([*opening(system), {"role": "user", "content": prompt}], tokenizer)
        return encode_text(prompt_for(prompt, self.row_format, self.template), tokenizer)

    def question_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return a chat template that asks the last message as a question in training was asked.

        Every message stands alone, as in training.
        """
        text = prompt_for(_ANSWER, self.row_format, self.template)
        before, _, after = text.partition(_ANSWER)
        encoded: Any = tokenizer("a")
        if encoded["input_ids"][0] == tokenizer.bos_token_id:
            before = f"{tokenizer.bos_token}{before}"
        refusal = "a model tuned on questions takes no system message"
        return (
            "{%- if messages[0]['role'] == 'system' -%}"
            f"{{{{ raise_exception({json.dumps(refusal)}) }}}}"
            "{%- endif -%}"
            f"{{{{ {json.dumps(before)} + messages[-1]['content'] + {json.dumps(after)} }}}}"
        )

    def require_takes(self, system: str | None) -> None:
        """Raise `ConfigError` for a system message in a form that has none."""
        if system and not self.is_chat:
            raise ConfigError(
                f"--system: {self.row_format} rows, on which the model was tuned, have no system "
                "message; --format messages asks it in its chat template all the same"
            )


def opening(system: str | None) -> list[Message]:
    """Return the messages that a conversation begins with."""
    return [{"role": "system", "content": system}] if system else []


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a text that is to go on: BOS as in training, no EOS behind it."""
    encoded: Any = tokenizer(text)
    ids = list(encoded["input_ids"])
    return ids[:-1] if appends_eos(tokenizer) else ids


def appends_eos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer ends every text with EOS of its own accord."""
    encoded: Any = tokenizer("a")
    return bool(encoded["input_ids"][-1] == tokenizer.eos_token_id)


def encode_chat(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a conversation in the tokenizer's chat template, open for the assistant.

    Raises:
        ConfigError: there is no template, or it does not take these messages.
    """
    require_chat_template(tokenizer)
    from jinja2 import TemplateError

    try:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
    except TemplateError as error:
        raise ConfigError(f"the chat template refuses these messages: {error}") from error
    return list(encoded["input_ids"])


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ConfigError` for a tokenizer without a chat template."""
    if tokenizer.chat_template is None:
        raise ConfigError("the tokenizer has no chat template; use `depthmix generate` with text")


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token with which the chat template closes an answer, if it is one of its own."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    behind = text.rpartition(_ANSWER)[2].lstrip()
    encoded: Any = tokenizer(behind, add_special_tokens=False)
    first = list(encoded["input_ids"][:1])
    return [token for token in first if token in tokenizer.added_tokens_decoder]
