"""`depthmix train --preview`: rows as the model gets them, and what of them is supervised."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from depthmix.data.tokens import IGNORED
from depthmix.train.arguments import TrainArguments
from depthmix.train.data import TrainingData, last_token, notes, prepare_data
from depthmix.train.objectives.preview import show_pairs, show_prompts, spread_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

_STYLE = "bold green"
_MARKS = "{+", "+}"


def preview(arguments: TrainArguments) -> None:
    """Print the first rows and the counts of all of them; nothing is trained or written.

    Raises:
        DataError: as `prepare_data`.
        ConfigError: as `prepare_data`.
    """
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    if arguments.run.objective != "sft":
        show = {"dpo": show_pairs, "grpo": show_prompts}[arguments.run.objective]
        show(arguments, console)
        return
    data = prepare_data(arguments)
    for number in range(min(arguments.run.preview or 0, len(data.train))):
        _show(console, data, number, arguments)
    if _coloured(console):
        console.print("supervised: ", end="")
        console.print("in this colour", style=_STYLE)
    else:
        console.print(f"supervised: between {_MARKS[0]} and {_MARKS[1]}", markup=False)
    for line in (*summary(data, arguments), *notes(data, arguments)):
        console.print(line, markup=False)


def summary(data: TrainingData, arguments: TrainArguments) -> list[str]:
    """Return the counts of a run's rows, a line each."""
    counts, run, training = data.counts, arguments.run, arguments.training
    lines = [
        f"rows: {len(data.train):,} of format {data.format}, supervise: {run.supervise}",
        f"tokens a row: {spread_of(counts.lengths)}; {counts.lengths.sum():,} in all",
        f"supervised: {counts.supervised.sum():,} tokens, {counts.share:.1%} of all; the first row "
        f"ends with {last_token(data)}",
        f"max_length {training.max_length}: {counts.cut:,} rows cut, {counts.dropped:,} left out "
        "with nothing to learn",
    ]
    if data.evaluation is not None:
        lines.insert(1, f"rows to evaluate on: {len(data.evaluation):,}")
    if training.packing:
        lines.append("packing: the rows are put together to sequences of max_length")
    return lines


def _show(console: Console, data: TrainingData, number: int, arguments: TrainArguments) -> None:
    row, counts = data.train[number], data.counts
    dropped = "" if counts.left[number] else "; left out: nothing to learn"
    console.print(
        f"row {number + 1}: {counts.lengths[number]:,} tokens, {counts.supervised[number]:,} "
        f"supervised{dropped}",
        style="dim",
    )
    limit = arguments.training.max_length
    keep_end = arguments.training.truncation_mode == "keep_end"
    window = slice(None) if limit is None else slice(-limit, None) if keep_end else slice(limit)
    console.print(_marked(console, data.tokenizer, row["input_ids"][window], row["labels"][window]))
    if len(row["input_ids"]) > len(row["input_ids"][window]):
        console.print(f"({len(row['input_ids']) - (limit or 0):,} tokens are cut)", style="dim")
    console.print()


def _marked(
    console: Console, tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]
) -> Text:
    """Return a row with its special tokens visible and what is supervised set apart."""
    from rich.text import Text

    text = Text()
    for supervised, piece in pieces(tokenizer, ids, labels):
        if not supervised:
            text.append(piece)
        elif _coloured(console):
            text.append(piece, style=_STYLE)
        else:
            text.append(piece.join(_MARKS))
    return text


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], labels: list[int]
) -> Iterator[tuple[bool, str]]:
    """Yield a row's text in pieces, each with whether it is supervised."""
    start, shown = 0, ""
    for supervised, run in groupby(label != IGNORED for label in labels):
        end = start + len(list(run))
        whole = _decoded(tokenizer, ids[:end])
        # A tokenizer may drop the blank in front of what it decodes alone.
        piece = whole[len(shown) :] if whole.startswith(shown) else None
        yield supervised, _decoded(tokenizer, ids[start:end]) if piece is None else piece
        start, shown = end, whole


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    options: dict[str, Any] = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(ids, **options))


def _coloured(console: Console) -> bool:
    return console.is_terminal and not console.no_color and console.color_system is not None
