"""What transformers' handlers of requests get their model and their tokens from: always one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any

import torch
from fastapi import HTTPException
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import GenerateManager, GenerationState

from depthmix.inference.complete import window_of
from depthmix.serve.stops import Pieces, up_to

# Whether who has sent the request that is being answered has hung up.
HUNG_UP: ContextVar[threading.Event] = ContextVar("hung_up")
# The seed of its tokens.
SEED: ContextVar[int | None] = ContextVar("seed", default=None)


class OneModel(ModelManager):
    """Gives the model that is served, and loads no other."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        super().__init__(model_timeout=-1)
        self.force_model = name
        self._pair = model, tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """Return the name as it is: what replies carry."""
        return model_id

    def load_model_and_processor(self, *_args: Any, **_options: Any) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""
        return self._pair


class InTurn(GenerateManager):
    """Answers one request after the other, on one thread, within the model's window.

    (Continuous batching would answer several at once, but transformers draws all its tokens as the
    first request said.)
    """

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *rest: Any, **options: Any
    ) -> Any:
        """Begin a reply that is sent as it comes."""
        _fit(model, inputs, gen_config)
        queue, streamer = super().generate_streaming(
            model, processor, inputs, gen_config, *rest, **options
        )
        return Pieces(queue, _stops(gen_config)), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, Any]:
        """Return the text of a reply, the length of its prompt, and its tokens."""
        _fit(model, inputs, gen_config)
        hung_up = HUNG_UP.get()

        def stop(ids: torch.Tensor, _scores: Any, **_options: Any) -> torch.Tensor:
            return torch.full((len(ids),), hung_up.is_set(), device=ids.device)

        arguments = {**inputs, "generation_config": gen_config, "tokenizer": processor}
        given = await self.async_submit(model.generate, **arguments, stopping_criteria=[stop])
        length = inputs["input_ids"].shape[-1]
        tokens = given[0, length:]
        text = processor.decode(tokens, skip_special_tokens=True)
        return up_to(text, _stops(gen_config)), length, tokens

    def submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        """Have a reply made in its turn, with the seed of its request."""
        return super().submit(_seeded, SEED.get(), fn, *args, **kwargs)

    def async_submit(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Do the same, to be awaited."""
        return super().async_submit(_seeded, SEED.get(), fn, *args, **kwargs)


class Generation(GenerationState):
    """Gives the one manager."""

    def __init__(self) -> None:
        super().__init__()
        self._manager: Any = InTurn()  # type: ignore[no-untyped-call]

    def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
        """Return it."""
        return self._manager


def _seeded(seed: int | None, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with a seed; what is drawn after it does not depend on that."""
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return fn(*args, **kwargs)


def _stops(gen_config: Any) -> Sequence[str]:
    stops = gen_config.stop_strings or ()
    return [stops] if isinstance(stops, str) else stops


def _fit(model: Any, inputs: Any, gen_config: Any) -> None:
    """Limit the length of a reply to the model's window; refuse a prompt that fills it."""
    length, window = inputs["input_ids"].shape[-1], window_of(model)
    if length == 0:
        raise HTTPException(400, "the prompt is empty")
    if window is None:
        return
    if length >= window:
        raise HTTPException(
            400, f"a prompt of {length} tokens fills the model's window of {window}"
        )
    gen_config.max_new_tokens = min(gen_config.max_new_tokens, window - length)


async def watch(receive: Any, hung_up: threading.Event, told: asyncio.Event) -> None:
    """Wait until the sender of a request, whose body is read, has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass
    hung_up.set()
    told.set()
