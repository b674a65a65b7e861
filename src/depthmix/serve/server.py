"""Serving a saved run: by transformers in this process, or by vLLM in its place."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from depthmix.errors import ConfigError
from depthmix.export.code import is_own_code

if TYPE_CHECKING:
    from depthmix.carry.saved_run import SavedRun
    from depthmix.pretrained import Loading


def serve(
    run: SavedRun, base: str | None, loading: Loading, host: str, port: int, api_key: str | None
) -> None:
    """Serve a model until Ctrl-C.

    Args:
        run: what is served, under the name by which it was found.
        base: base model of an adapter, where it is not the one that the adapter names.
        loading: overrules what the run has recorded.
        host: address to listen on.
        port: 0: a free one.
        api_key: what requests must carry; None: nothing.

    Raises:
        ConfigError: what serves is not installed, or the address cannot be listened on.
        DepthmixError: something cannot be loaded, or does not fit.
    """
    try:
        import uvicorn

        from depthmix.serve.app import build_app
    except ImportError as error:
        raise ConfigError(f"serving needs {error.name}: pip install 'depthmix[serve]'") from error
    from depthmix.inference.form import Form
    from depthmix.inference.loading import load_for_use

    listening = _listen(host, port)  # before a model is loaded for nothing
    form = Form.of(run)
    model, tokenizer = load_for_use(run, form, base, loading)
    if form.is_question:
        tokenizer.chat_template = form.question_template(tokenizer)
    logging.getLogger("transformers").setLevel(logging.ERROR)  # remarks on every request
    app = build_app(model, tokenizer, run.name, api_key)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    shown, actual = listening.getsockname()[:2]
    print(f"serving {run.name} at http://{shown}:{actual}/v1 (Ctrl-C ends it)", flush=True)
    if host not in ("127.0.0.1", "localhost", "::1") and api_key is None:
        print("note: anybody who reaches this address can use it; see --api-key", file=sys.stderr)
    uvicorn.Server(config).run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"--host {host} --port {port}: cannot be listened on: {reason}"
        ) from error


def serve_by_vllm(
    folder: Path, name: str, host: str, port: int, api_key: str | None, further: Sequence[str]
) -> int:
    """Have vLLM serve an exported folder; return its exit status.

    Args:
        folder: what is served.
        name: what requests call the model.
        host: address to listen on.
        port: port to listen on.
        api_key: what requests must carry; None: nothing.
        further: arguments of `vllm serve`.

    Raises:
        ConfigError: there is no vLLM, or the folder has code of others.
    """
    program = find_vllm()
    if not is_own_code(folder):
        raise ConfigError(f"{folder}: vLLM would run modelling code that depthmix did not write")
    command = [program, "serve", str(folder), "--trust-remote-code", "--served-model-name", name]
    command += ["--host", host, "--port", str(port), *further]
    environment = dict(os.environ)
    if api_key is not None:  # not among the arguments, which everybody on the machine can read
        environment["VLLM_API_KEY"] = api_key
    # Of a session of its own: a terminal's Ctrl-C would reach it twice.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    former = {
        number: signal.signal(number, lambda number, _frame: process.send_signal(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        return process.wait()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def find_vllm() -> str:
    """Return the program `vllm`.

    Raises:
        ConfigError: there is none.
    """
    program = shutil.which("vllm")
    if program is None:
        raise ConfigError(
            "--engine vllm: there is no program vllm here; install it in an environment of its own "
            "(it wants another transformers) and put that on PATH: see docs/serving.md"
        )
    return program
