"""`depthmix generate`: complete prompts with a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.commands.model_options import (
    add_model_options,
    add_sampling_options,
    find_run,
    loading,
    require_routing,
    showing_routing,
)
from depthmix.commands.parser import Parser, integer
from depthmix.data.formats import FORMATS
from depthmix.errors import ConfigError, DataError
from depthmix.inference.complete import complete
from depthmix.inference.form import Form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = """\
examples:
  depthmix generate out --prompt "What is 7 + 3?"
  depthmix generate out --prompts-file questions.txt --json > answers.jsonl
  git diff | depthmix generate out --prompt - --system "Write a commit message."
  depthmix generate out --prompt "Once upon" --format text --temperature 0.8 --n 3 --seed 1

Prompts take the form of the rows that the model was tuned on, and end where those rows ended.
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = _parser().parse_args(argv)
    if arguments.n > 1 and arguments.temperature == 0:
        raise ConfigError("--n: at --temperature 0 all samples are the same; try 0.7")
    prompts = _prompts(arguments)
    saved = find_run(arguments.target, arguments.revision)
    if arguments.show_routing:
        require_routing(saved)
    form = Form.of(saved, arguments.format)
    form.require_takes(arguments.system)
    from transformers import set_seed

    from depthmix.inference.loading import load_for_use

    model, tokenizer = load_for_use(saved, form, arguments.model, loading(arguments))
    told = (form.row_format, form.template, tokenizer, arguments.system)
    encoded = [_encoded(prompt, *told) for prompt in prompts]
    _tell_of_blanks(prompts, form)
    if not (saved.record.row_format or arguments.format) and tokenizer.chat_template:
        note = "there is no record of how it was tuned: asked in plain text; or --format messages"
        print(f"note: {saved.name}: {note}", file=sys.stderr)
    set_seed(arguments.seed)  # once: equal prompts are different samples
    with showing_routing(model, arguments.show_routing):
        if len(encoded) == arguments.n == 1 and not arguments.json:
            complete(model, tokenizer, encoded, arguments, said=_say)
            print()
        else:
            for sample in _samples(model, tokenizer, prompts, encoded, arguments):
                print(_shown(sample, arguments), flush=True)
    return 0


def _parser() -> Parser:
    usage = "MODEL (--prompt TEXT | --prompts-file FILE) [options]"
    parser = Parser("generate", "Complete prompts with a tuned model.", _EXAMPLES, usage)
    add_model_options(parser)
    group = parser.add_argument_group("prompts")
    one = group.add_mutually_exclusive_group(required=True)
    one.add_argument("--prompt", metavar="TEXT", help="what to complete; -: all of standard input")
    one.add_argument("--prompts-file", metavar="FILE", help="one prompt a line; -: standard input")
    group.add_argument(
        "--format",
        choices=list(FORMATS),
        metavar="FORM",
        help="put the prompt into the form of such rows (default: of those in the training data): "
        + ", ".join(FORMATS),
    )
    group.add_argument("--system", metavar="TEXT", help="system message, for models of messages")
    group.add_argument(
        "--n", type=integer(1), default=1, metavar="N", help="samples of each prompt (default: 1)"
    )
    group.add_argument(
        "--batch-size", type=integer(1), default=8, metavar="N", help="at once (default: 8)"
    )
    group.add_argument("--json", action="store_true", help="a line of JSON for each sample")
    add_sampling_options(parser)
    return parser


Sample = dict[str, Any]


def _samples(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    encoded: Sequence[list[int]],
    arguments: argparse.Namespace,
) -> Iterator[Sample]:
    """Complete every prompt n times, a batch at a time."""
    wanted = [(place, copy) for place in range(len(prompts)) for copy in range(arguments.n)]
    for start in range(0, len(wanted), arguments.batch_size):
        batch = wanted[start : start + arguments.batch_size]
        ids = [encoded[place] for place, _ in batch]
        texts = complete(model, tokenizer, ids, arguments)
        for (place, copy), text in zip(batch, texts, strict=True):
            yield {
                "index": place + 1,
                "sample": copy + 1,
                "prompt": prompts[place],
                "completion": text,
            }


def _shown(sample: Sample, arguments: argparse.Namespace) -> str:
    if arguments.json:
        return json.dumps(sample, ensure_ascii=False)
    number = f"{sample['index']}.{sample['sample']}" if arguments.n > 1 else sample["index"]
    return f"[{number}] {sample['completion'].strip()}"


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt == "-":
        prompts = [_text_of("-")]
    elif arguments.prompt is not None:
        prompts = [arguments.prompt]
    else:
        # By line breaks alone: U+2028 and the like are part of a prompt.
        lines = (line.removesuffix("\r") for line in _text_of(arguments.prompts_file).split("\n"))
        prompts = [line for line in lines if line.strip()]
    if not any(prompt.strip() for prompt in prompts):
        raise ConfigError("there is no prompt")
    return prompts


def _text_of(name: str) -> str:
    """Return what a file holds, or standard input, without a byte-order mark."""
    source = "standard input" if name == "-" else name
    content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{source}: line {line}: not UTF-8 text") from error


def _encoded(
    prompt: str,
    row_format: str,
    template: str | None,
    tokenizer: PreTrainedTokenizerBase,
    system: str | None = None,
) -> list[int]:
    """Return the token ids that a training row with this prompt begins with."""
    return Form(row_format, template).encode(prompt, tokenizer, system)


def _tell_of_blanks(prompts: Sequence[str], form: Form) -> None:
    """Say where a prompt ends with a blank, which in running text belongs to the next word."""
    ending = sum(prompt != prompt.rstrip(" \t") for prompt in prompts)
    if ending and not (form.is_chat or form.is_question):
        which = "the prompt ends" if len(prompts) == 1 else f"{ending} prompts end"
        print(
            f"note: {which} with a blank, which most tokenizers join with the word behind it: "
            "completions are better without it",
            file=sys.stderr,
        )
