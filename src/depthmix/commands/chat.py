"""`depthmix chat`: talk to a model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from depthmix.carry.saved_run import SavedRun
from depthmix.commands.model_options import (
    add_model_options,
    add_sampling_options,
    find_run,
    loading,
    require_routing,
    showing_routing,
)
from depthmix.commands.parser import Parser
from depthmix.data.formats import FORMATS
from depthmix.errors import ConfigError, DepthmixError
from depthmix.inference.complete import complete, window_of
from depthmix.inference.conversation import Conversation
from depthmix.inference.form import Form, require_chat_template

_HELP = """\
/help          show this
/reset         forget the conversation
/system TEXT   set the system message, and forget the conversation; without TEXT: take it away
/routing       show the weights of the late layers under every answer, or no longer
/exit, Ctrl-D  end
Ctrl-C         end the answer, not the conversation"""

_EXAMPLES = f"""\
In the conversation:

{_HELP}

examples:
  depthmix chat out
  depthmix chat out --system "Answer in one sentence." --temperature 0.7
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = _parser().parse_args(argv)
    saved = find_run(arguments.target, arguments.revision)
    if arguments.show_routing:
        require_routing(saved)
    form = _form(Form.of(saved, arguments.format), arguments)
    from transformers import set_seed

    from depthmix.inference.loading import load_for_use

    model, tokenizer = load_for_use(saved, form, arguments.model, loading(arguments))
    if form.is_chat:
        require_chat_template(tokenizer)
    set_seed(arguments.seed)
    talk = Conversation(form, tokenizer, _room(model, arguments), arguments.system)
    _Chat(saved, model, tokenizer, talk, arguments).run()
    return 0


def _parser() -> Parser:
    parser = Parser("chat", "Talk to a tuned model.", _EXAMPLES, "MODEL [options]")
    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message to begin with")
    parser.add_argument(
        "--format",
        choices=list(FORMATS),
        metavar="FORM",
        help="form of the messages, where it is not to be that of training",
    )
    add_sampling_options(parser)
    return parser


def _form(trained: Form, arguments: argparse.Namespace) -> Form:
    """Return how to ask: as in training, or in the chat template where that was plain text."""
    form = trained if trained.is_question else Form("messages")
    form.require_takes(arguments.system)
    return form


def _room(model: Any, arguments: argparse.Namespace) -> int | None:
    """Return how many tokens a prompt may have, so that there is room for an answer."""
    window = window_of(model)
    return None if window is None else window - min(arguments.max_new_tokens, window // 4)


class _Chat:
    """The loop of reading and answering."""

    def __init__(
        self,
        saved: SavedRun,
        model: Any,
        tokenizer: Any,
        talk: Conversation,
        arguments: argparse.Namespace,
    ) -> None:
        self._saved, self._model, self._tokenizer = saved, model, tokenizer
        self._talk, self._sampling = talk, arguments
        self._routing = arguments.show_routing

    def run(self) -> None:
        """Answer until the end."""
        print("/help shows the commands, Ctrl-D ends.")
        if self._talk.form.is_question:
            kind = self._talk.form.row_format
            print(f"Tuned on {kind} rows: every message is asked in their form, and stands alone.")
        for said in _lines():
            if said.startswith("/"):
                name, _, rest = said.partition(" ")
                if name == "/exit":
                    return
                self._command(name, rest.strip())
            elif said:
                self._answer(said)

    def _command(self, name: str, rest: str) -> None:
        talk = self._talk
        if name == "/help":
            print(_HELP)
        elif name == "/reset":
            talk.reset()
        elif name == "/system" and talk.form.is_question:
            print("The model was tuned on single questions, which have no system message.")
        elif name == "/system":
            talk.system = rest or None
            talk.reset()
        elif name == "/routing":
            self._switch_routing()
        else:
            print(f"There is no command {name}; /help shows those that there are.")

    def _switch_routing(self) -> None:
        try:
            require_routing(self._saved)
        except DepthmixError as error:
            print(str(error).removeprefix("--show-routing: "))
            return
        self._routing = not self._routing
        print(f"routing is {'shown' if self._routing else 'no longer shown'}")

    def _answer(self, said: str) -> None:
        talk, parts = self._talk, _Parts()
        before = talk.dropped
        try:
            prompt = talk.ask(said)
        except ConfigError as error:
            print(error)
            return
        if talk.dropped > before:
            print(f"(the first {talk.dropped} messages no longer fit and are left out)")
        try:
            with showing_routing(self._model, self._routing):
                complete(self._model, self._tokenizer, [prompt], self._sampling, said=parts)
                print()
        except KeyboardInterrupt:
            print("\n(stopped)")
        talk.answered(parts.text)


class _Parts:
    """Prints what comes, and keeps it."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, part: str) -> None:
        """Take the next part."""
        print(part, end="", flush=True)
        self.text += part


def _lines() -> Iterator[str]:
    """Read lines to the end, with editing and history where a person types them."""
    read = _reader()
    while True:
        try:
            yield read().strip()
        except KeyboardInterrupt:
            print("(Ctrl-D ends the conversation)")
        except EOFError:
            print()
            return


def _reader() -> Callable[[], str]:
    if not sys.stdin.isatty():
        return lambda: input("> ")
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    return lambda: session.prompt("> ")
