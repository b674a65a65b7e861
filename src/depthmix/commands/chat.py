"""`depthmix chat`: talk to a tuned model."""

from __future__ import annotations

from collections.abc import Sequence

from depthmix.commands.generate import (
    add_generation_options,
    add_model_options,
    check_sampling,
    complete,
    encode_chat,
    showing_routing,
)
from depthmix.commands.parser import Parser
from depthmix.pretrained import load_tuned

_EXAMPLES = """\
In the conversation: /reset forgets it, /exit or Ctrl-D ends it.

examples:
  depthmix chat out
  depthmix chat out --system "Answer in one sentence." --temperature 0.7
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = Parser("chat", "Talk to a tuned model.", _EXAMPLES, "ADAPTER [options]")
    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message to begin with")
    add_generation_options(parser)
    arguments = parser.parse_args(argv)
    check_sampling(arguments)
    model, tokenizer = load_tuned(arguments.adapter, arguments.model)
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    encode_chat([*opening, {"role": "user", "content": "?"}], tokenizer)  # is there a template?
    history = list(opening)
    print("/reset forgets the conversation, /exit or Ctrl-D ends it.")
    while (said := _read()) is not None:
        if said == "/reset":
            history = list(opening)
        elif said:
            history.append({"role": "user", "content": said})
            prompt = encode_chat(history, tokenizer)
            with showing_routing(arguments, model):
                answer = complete(model, tokenizer, [prompt], arguments, stream=True)[0]
            history.append({"role": "assistant", "content": answer})
    return 0


def _read() -> str | None:
    """Return the next line, or None at the end."""
    try:
        said = input("> ").strip()
    except EOFError:
        print()
        return None
    return None if said == "/exit" else said
