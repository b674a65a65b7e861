"""`depthmix generate`: complete prompts with a tuned model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.commands.parser import Parser
from depthmix.data.formats import FORMATS, conversational, prompt_for
from depthmix.errors import ConfigError
from depthmix.pretrained import has_mode, load_tuned, trained_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EXAMPLES = """\
examples:
  depthmix generate out --prompt "What is 7 + 3?"
  depthmix generate out --prompts-file questions.txt --max-new-tokens 64 > answers.txt
  depthmix generate out --prompt "Once upon" --format text --temperature 0.8 --seed 1
"""


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    arguments = _parser().parse_args(argv)
    check_sampling(arguments)
    prompts = _prompts(arguments)
    model, tokenizer = load_tuned(arguments.adapter, arguments.model)
    row_format, template = trained_on(arguments.adapter)
    if arguments.format:
        row_format, template = arguments.format, None
    encoded = [_encoded(prompt, row_format, template, tokenizer) for prompt in prompts]
    with showing_routing(arguments, model):
        if len(encoded) == 1:
            complete(model, tokenizer, encoded, arguments, stream=True)
        else:
            _complete_all(model, tokenizer, encoded, arguments)
    return 0


def _parser() -> Parser:
    usage = "ADAPTER (--prompt TEXT | --prompts-file FILE) [options]"
    parser = Parser("generate", "Complete prompts with a tuned model.", _EXAMPLES, usage)
    add_model_options(parser)
    group = parser.add_argument_group("prompts")
    one = group.add_mutually_exclusive_group(required=True)
    one.add_argument("--prompt", metavar="TEXT", help="the text to complete, streamed")
    one.add_argument("--prompts-file", metavar="FILE", help="one prompt a line")
    group.add_argument(
        "--format",
        choices=list(FORMATS),
        metavar="FORM",
        help="put the prompt into the form of such rows (default: of those in the training data): "
        + ", ".join(FORMATS),
    )
    group.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="prompts at once (default: 8)"
    )
    add_generation_options(parser)
    return parser


def add_model_options(parser: Parser) -> None:
    """Add the arguments that name the model."""
    parser.add_argument("adapter", metavar="ADAPTER", help="output folder of `depthmix train`")
    parser.add_argument(
        "--model", metavar="BASE", help="base model (default: the one the adapter names)"
    )


def add_generation_options(parser: Parser) -> None:
    """Add the arguments of sampling."""
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="length limit (default: 256)"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: always the likeliest token (default: 0)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the likeliest tokens of this total probability (default: 1)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    group.add_argument(
        "--show-routing", action="store_true", help="print the mean weight of each late layer"
    )


def check_sampling(arguments: argparse.Namespace) -> None:
    """Refuse values out of range, before anything is loaded."""
    if arguments.temperature < 0:
        raise ConfigError("--temperature must be >= 0")
    if not 0 < arguments.top_p <= 1:
        raise ConfigError("--top-p must be in (0, 1]")
    if arguments.max_new_tokens < 1:
        raise ConfigError("--max-new-tokens must be >= 1")
    if arguments.show_routing and not has_mode(arguments.adapter):
        raise ConfigError(f"--show-routing: {arguments.adapter} holds no MoDE")


def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    arguments: argparse.Namespace,
    stream: bool = False,
) -> list[str]:
    """Return the completions of encoded prompts.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompts: what to complete; several are padded on the left.
        arguments: the generation options.
        stream: print the tokens as they come; for one prompt.
    """
    from transformers import TextStreamer, set_seed

    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    set_seed(arguments.seed)
    output = model.generate(
        **inputs,
        max_new_tokens=arguments.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer if stream else None,
        **_sampling(arguments),
    )
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return list(tokenizer.batch_decode(new_tokens, skip_special_tokens=True))


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return all sampling options: what a model's own generation config says does not mix in."""
    if arguments.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "top_k": 0,
    }


@contextmanager
def showing_routing(arguments: argparse.Namespace, model: Any) -> Iterator[None]:
    """Print the mean weight of each late layer over the block, if that was asked for."""
    import depthmix

    if not arguments.show_routing:
        yield
        return
    with depthmix.routing(model) as record:
        yield
    weights = zip(record.layers, record.mean().tolist(), strict=True)
    listed = ", ".join(f"layer {layer}: {weight:.3f}" for layer, weight in weights)
    print(f"routing: {listed}", file=sys.stderr)


def _complete_all(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    arguments: argparse.Namespace,
) -> None:
    for start in range(0, len(prompts), arguments.batch_size):
        batch = prompts[start : start + arguments.batch_size]
        for number, text in enumerate(complete(model, tokenizer, batch, arguments), start + 1):
            print(f"[{number}] {text.strip()}", flush=True)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt is not None:
        prompts = [arguments.prompt]
    else:
        lines = Path(arguments.prompts_file).read_text("utf-8").splitlines()
        prompts = [line for line in lines if line.strip()]
    if not any(prompt.strip() for prompt in prompts):
        raise ConfigError("there is no prompt")
    return prompts


def _encoded(
    prompt: str, row_format: str, template: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the token ids that a training row with this prompt begins with."""
    if conversational(row_format):
        return encode_chat([{"role": "user", "content": prompt}], tokenizer)
    encoded: Any = tokenizer(prompt_for(prompt, row_format, template))
    return list(encoded["input_ids"])


def encode_chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a conversation in the tokenizer's chat template, open for the assistant."""
    if tokenizer.chat_template is None:
        raise ConfigError("the tokenizer has no chat template; use `depthmix generate` with text")
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True
    )
    return list(encoded["input_ids"])
