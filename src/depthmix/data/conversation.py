"""Which characters of a conversation are supervised, found by rendering its beginnings.

For an answer, the chat template is asked twice: for the messages before it and a generation prompt,
as the model will be prompted, and for the messages up to it. Where both begin the whole
conversation, what lies between them is the answer, its end token included. No template has to say
so by generation marks.

Some templates render an answer otherwise once others follow (they drop earlier thoughts, or move
tools to the last question). Such a conversation becomes one row an answer, each as the model meets
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from depthmix.data.fields import Row, common_length
from depthmix.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Supervise = Literal["assistant", "all", "last"]
Render = Callable[[Sequence[Row], bool], str]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: the text.
        spans: the characters from ... to that are supervised.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


def renderer(
    tokenizer: PreTrainedTokenizerBase,
    tools: list[Any] | None = None,
    options: Row | None = None,
    parts: bool = False,
) -> Render:
    """Return what renders messages, with a generation prompt or without, by the chat template.

    Args:
        tokenizer: its template is taken.
        tools: what the model may call.
        options: further variables of the template.
        parts: whether the template reads content as parts; see `reads_parts`.
    """

    def render(messages: Sequence[Row], generation: bool) -> str:
        text = tokenizer.apply_chat_template(
            [_in_parts(message) for message in messages] if parts else list(messages),
            tools=tools,
            tokenize=False,
            add_generation_prompt=generation,
            **(options or {}),
        )
        return str(text)

    return _refusing(render)


def reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template takes content as parts alone, as those of models with images do.

    They render nothing of a text, without a word.
    """

    def renders(parts: bool) -> bool:
        try:
            probe = [{"role": "user", "content": "What?"}]
            return "What?" in renderer(tokenizer, parts=parts)(probe, False)
        except DataError:
            return False

    return not renders(parts=False) and renders(parts=True)


def renders_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template says anything of tools; many leave them out without a word."""
    function = {"name": "depthmix_probe", "description": "A probe.", "parameters": _NOTHING}
    render = renderer(tokenizer, [{"type": "function", "function": function}])
    try:
        return "depthmix_probe" in render([{"role": "user", "content": "What?"}], True)
    except DataError:
        return True  # it takes them in a form of its own


_NOTHING = {"type": "object", "properties": {}}


def _in_parts(message: Row) -> Row:
    if not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def supervised(
    messages: Sequence[Row], start: int, supervise: Supervise, render: Render
) -> list[Rendered]:
    """Return a conversation as rows to train on.

    Args:
        messages: the conversation.
        start: the first message that may be supervised: those before it are a prompt.
        supervise: assistant: every answer; last: the last one; all: the whole text.
        render: (messages, whether a generation prompt follows) -> text.

    Raises:
        DataError: the template does not take the messages.
    """
    whole = render(messages, False)
    if supervise == "all":
        return [Rendered(whole, ((0, len(whole)),))]
    answers = [n for n in range(start, len(messages)) if messages[n]["role"] == "assistant"]
    if supervise == "last":
        answers = answers[-1:]
    beginnings = [render(messages[: n + 1], False) for n in answers]
    if all(whole.startswith(beginning.rstrip()) for beginning in beginnings):
        spans = (
            _span(whole, beginning, messages[: n + 1], render)
            for n, beginning in zip(answers, beginnings, strict=True)
        )
        return [Rendered(whole, tuple(spans))]
    return [
        Rendered(beginning, (_span(beginning, beginning, messages[: n + 1], render),))
        for n, beginning in zip(answers, beginnings, strict=True)
    ]


def _span(whole: str, through: str, messages: Sequence[Row], render: Render) -> tuple[int, int]:
    """Return where the last message starts and ends; blanks behind its end token are left out."""
    *before, answer = messages
    prompt = render(before, True) if before else ""
    start, end = common_length(prompt, whole), len(through.rstrip())
    _require_calls(answer, whole[start:end], len(messages))
    return start, end


def _require_calls(answer: Row, text: str, number: int) -> None:
    """Raise a `DataError` where a template leaves tool calls out: the model would learn silence."""
    for call in answer.get("tool_calls") or []:
        called = call.get("function", call) if isinstance(call, dict) else {}
        name = called.get("name") if isinstance(called, dict) else None
        if isinstance(name, str) and name not in text:
            raise DataError(
                f"message {number}: the chat template leaves out the call of {name}: it knows no "
                "tool calls, or not in this form; give one that does with chat_template_path"
            )


def _refusing(render: Render) -> Render:
    """Turn what a template raises into a `DataError`."""
    from jinja2 import TemplateError

    def checked(messages: Sequence[Row], generation: bool) -> str:
        try:
            return render(messages, generation)
        except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise DataError(f"the chat template does not take the messages: {error}") from error

    return checked
