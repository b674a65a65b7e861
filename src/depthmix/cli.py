"""The `depthmix` command: finds the sub-command and turns what goes wrong into one clear line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import depthmix
import depthmix.quiet
from depthmix.errors import ConfigError, DepthmixError, Stopped
from depthmix.pretrained import ignore_renamed_properties

COMMANDS = {
    "train": "tune a model on your data, with MoDE or without",
    "generate": "complete prompts with a tuned model",
    "chat": "talk to a tuned model",
    "serve": "serve a model by OpenAI's interface",
    "export": "write a folder that transformers loads without depthmix",
    "eval": "score a model on arithmetic and commonsense tasks",
    "report": "show what the layers and the router of a run do, on one page",
    "calibrate": "fit a temperature to a tuned model, on rows that were held out",
    "compare": "compare tuning methods over seeds and tasks",
    "bench": "measure time and memory against what one would use instead",
    "probe": "measure every layer on a task, and recommend how deep to tune",
    "plan": "tell what tuning a model takes, without its weights",
    "cache": "list or clear cached states",
    "info": "show what MoDE finds in a model, or what an adapter holds",
}

_USAGE = """\
usage: depthmix COMMAND [arguments]

Tune language models with a mixture-of-depths ensemble (MoDE, arXiv 2410.13077).

commands:
{commands}

options:
  -h, --help  show this help; `depthmix COMMAND --help` shows a command's own
  --version   show the version

examples:
  depthmix info HuggingFaceTB/SmolLM2-135M
  depthmix train --model_name_or_path HuggingFaceTB/SmolLM2-135M \\
      --dataset train.jsonl --output_dir out
  depthmix generate out --prompt "What is 7 + 3?"

Errors are one line; DEPTHMIX_TRACEBACK=1 shows where they come from.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status.

    0: done. 1: something failed. 2: the command line or the configuration is wrong.
    130, 143: stopped by Ctrl-C, by SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("depthmix: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard_output()
        return 1
    except SystemExit as stop:  # argparse has printed its help
        return int(stop.code or 0)
    except Stopped as stop:
        if str(stop):
            print(f"depthmix: {stop}", file=sys.stderr)
        return stop.status
    except (DepthmixError, OSError) as error:
        if os.environ.get("DEPTHMIX_TRACEBACK"):
            raise
        _close_bars()
        print(f"depthmix: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def one_line(error: BaseException) -> str:
    """Return the message of an error as one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        print(_usage(), end="", file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(_usage(), end="")
        return 0
    if name == "--version":
        print(f"depthmix {depthmix.__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(f"unknown command {name!r}; commands are {', '.join(COMMANDS)}")
    ignore_renamed_properties()
    if not sys.stderr.isatty():  # bars are drawn over and over, which a file keeps
        os.environ.setdefault("TQDM_DISABLE", "1")
    command = importlib.import_module(f"depthmix.commands.{name}")
    return int(command.run(rest))


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return _USAGE.format(commands="\n".join(lines))


def _close_bars() -> None:
    """End the line of a progress bar that is still open, so that an error gets one of its own."""
    if sys.stderr.isatty() and "tqdm.std" in sys.modules:
        from tqdm.std import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


def _discard_output() -> None:
    """Point stdout at nothing, so that Python's flush at exit does not complain (`| head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
