"""Complete encoded prompts, within what the model can see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from depthmix.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@runtime_checkable
class Sampling(Protocol):
    """How tokens are drawn."""

    max_new_tokens: int
    temperature: float  # 0: always the likeliest token
    top_p: float


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    said: Callable[[str], None] | None = None,
) -> list[str]:
    """Return the completions of encoded prompts.

    Random numbers go on from where they are: whoever calls sets the seed, once a run.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: what to complete; several are padded on the left.
        sampling: how.
        said: is given the text as it comes; for one prompt.

    Raises:
        ConfigError: a prompt fills the model's window.
    """
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(model.device)
    length = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs,
        max_new_tokens=_room(model, length, sampling.max_new_tokens),
        pad_token_id=tokenizer.pad_token_id,
        streamer=_streamer()(tokenizer, said) if said else None,
        **_drawing(sampling),
    )
    return list(tokenizer.batch_decode(output[:, length:], skip_special_tokens=True))


def window_of(model: Any) -> int | None:
    """Return how many tokens a model can see, if its configuration says so."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return window if isinstance(window, int) and window > 0 else None


def _room(model: Any, length: int, wanted: int) -> int:
    window = window_of(model)
    if window is None:
        return wanted
    if length >= window:
        raise ConfigError(f"a prompt of {length} tokens fills the model's window of {window}")
    return min(wanted, window - length)


def _drawing(sampling: Sampling) -> dict[str, Any]:
    """Return all sampling options: what a model's own generation config says does not mix in."""
    if sampling.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
    }


@cache
def _streamer() -> type[Any]:
    """Return a class of streamers that hand on their text; transformers is imported here."""
    from transformers import TextStreamer

    class Handing(TextStreamer):
        def __init__(self, tokenizer: Any, said: Callable[[str], None]) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self._said = said

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self._said(text)

    return Handing
