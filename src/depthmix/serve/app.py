"""The application: OpenAI's chat and completions, by the handlers of `transformers serve`."""

from __future__ import annotations

import asyncio
import hmac
import threading
import time
import uuid
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler

from depthmix.serve.generation import HUNG_UP, SEED, Generation, OneModel, watch

# Of the fields that transformers ignores, these change nothing in a reply.
_HARMLESS = {"metadata", "service_tier", "store", "stream_options", "user"}
# Fields that it takes without a word, and ignores or means otherwise: its penalty of frequency is
# a factor for whatever has occurred, and a suffix is put behind the reply.
_OTHERWISE: dict[type[Any], set[str]] = {
    ChatCompletionHandler: {"frequency_penalty", "moderation", "verbosity"},
    CompletionHandler: {"frequency_penalty", "logit_bias", "suffix"},
}
# Values, beside null, that ask for nothing.
_NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": "auto",
    "functions": [],
    "logit_bias": {},
    "logprobs": False,
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "auto",
    "top_logprobs": 0,
    "verbosity": "medium",
}


def build_app(model: Any, tokenizer: Any, name: str, api_key: str | None = None) -> Any:
    """Return the application (ASGI) that serves a model.

    Tokens are drawn as OpenAI's interface says: at temperature 1 unless a request says otherwise,
    and at 0 the likeliest one is taken.

    Args:
        model: ready to generate.
        tokenizer: the model's, with its chat template if it has one.
        name: what requests call the model.
        api_key: what requests must carry; None: nothing.
    """
    model.generation_config.update(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.eos_token_id
    app = FastAPI(title="depthmix", openapi_url=None)
    manager, generation = OneModel(name, model, tokenizer), Generation()
    handlers: dict[str, Any] = {
        "/v1/chat/completions": ChatCompletionHandler(manager, generation),
        "/v1/completions": CompletionHandler(manager, generation),
    }
    described = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "depthmix"}

    async def answer(request: Request, body: dict[str, Any]) -> Any:
        handler = handlers[request.url.path]
        _require_supported(body, handler._unused_fields | _OTHERWISE[type(handler)])
        SEED.set(body.pop("seed", None))  # transformers would sow it before the request's turn
        return await handler.handle_request(body, str(uuid.uuid4()))

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described]}

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    for path in handlers:
        app.post(path, response_model=None)(answer)
    app.get("/v1/models")(models)
    app.get("/health")(health)
    app.exception_handler(HTTPException)(_refused)
    for kind in (KeyError, TypeError, ValueError, TemplateError):  # of what a request holds
        app.exception_handler(kind)(_not_understood)
    return Guard(app, api_key)


class Guard:
    """Lets in who has the key, and tells the model's threads who has hung up (ASGI)."""

    def __init__(self, app: Any, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._admits(scope):
            await self._answer(scope, receive, send)
        else:
            await _error(401, "the API key is missing or wrong")(scope, receive, send)

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        body = await _body(receive)
        hung_up, told = threading.Event(), asyncio.Event()
        HUNG_UP.set(hung_up)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await told.wait()
            return {"type": "http.disconnect"}

        watching = asyncio.create_task(watch(receive, hung_up, told))
        try:
            await self._app(scope, replay, send)
        finally:
            watching.cancel()

    def _admits(self, scope: Any) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        free = self._expected is None or scope["path"] == "/health"
        return free or hmac.compare_digest(given, self._expected)


async def _body(receive: Any) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _require_supported(body: dict[str, Any], unmet: set[str]) -> None:
    """Refuse fields that are not met: the reply would not be what was asked for."""
    asked = sorted((unmet - _HARMLESS).intersection(body))
    refused = [name for name in asked if not _is_neutral(name, body[name])]
    if refused:
        raise HTTPException(400, f"not supported here: {', '.join(refused)}")


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a value asks for nothing; 0 and 1 are no truth values: `logprobs: 0` asks for one."""
    neutral = _NEUTRAL.get(name)
    same_kind = isinstance(value, bool) == isinstance(neutral, bool)
    return value is None or (value == neutral and same_kind)


async def _refused(_request: Request, error: Any) -> JSONResponse:
    return _error(error.status_code, str(error.detail))


async def _not_understood(_request: Request, error: Exception) -> JSONResponse:
    what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return _error(400, what)


def _error(status: int, message: str) -> JSONResponse:
    """Return an error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)
