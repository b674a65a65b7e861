"""The data of a run: rows as the model gets them, and what there is to say about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.data.counts import TokenCounts, count_tokens
from depthmix.data.formats import Columns, conversational
from depthmix.data.load import Source, load_source, place_of
from depthmix.data.splits import held_out
from depthmix.data.tokens import RefusedRow, tokenised
from depthmix.errors import ConfigError, DataError
from depthmix.pretrained import load_tokenizer, load_tokenizer_of
from depthmix.train.arguments import TrainArguments
from depthmix.train.objectives.options import PURPOSES
from depthmix.train.objectives.start import adapter_at

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl.trainer.sft_config import SFTConfig


@dataclass(frozen=True)
class TrainingData:
    """What a run is trained and evaluated on.

    Attributes:
        train: rows to train on, as `input_ids` and `labels`.
        evaluation: rows to evaluate on, or None.
        written: how many rows to train on were written; a chat template may make more of them.
        format: the format of the rows, by which the tuned model is prompted.
        tokenizer: the tokenizer, with the run's chat template and end-of-sequence token.
        counts: the tokens of `train`.
    """

    train: Dataset
    evaluation: Dataset | None
    written: int
    format: str
    tokenizer: PreTrainedTokenizerBase
    counts: TokenCounts


def prepare_data(arguments: TrainArguments) -> TrainingData:
    """Load, check and tokenise the data of a run; the first process makes what the others read.

    Raises:
        DataError: a row is broken, or none is left within `max_length`.
        ConfigError: tokenizer and data do not go together.
    """
    run, training = arguments.run, arguments.training
    if run.objective != "sft":
        raise ConfigError(f"objective {run.objective} has no rows with answers to learn")
    with training.main_process_first(desc="data"):
        loaded = load_rows(arguments)
        how = (loaded.tokenizer, run.supervise, training.dataset_num_proc)
        sets = [
            None if one is None else _tokenised(one, *how)
            for one in (loaded.train, loaded.evaluation)
        ]
    train, evaluation = sets
    assert train is not None
    counts = count_tokens(train, training.max_length, training.truncation_mode == "keep_end")
    return TrainingData(
        train, evaluation, len(loaded.train.rows), loaded.train.format, loaded.tokenizer, counts
    )


@dataclass(frozen=True)
class ReadRows:
    """Rows as `load_source` gives them.

    Attributes:
        rows: the rows.
        format: their format.
        source: where they come from.
    """

    rows: Dataset
    format: str
    source: Source


@dataclass(frozen=True)
class LoadedRows:
    """What a run reads, before any of it is tokenised.

    Attributes:
        train: rows to train on.
        evaluation: rows to evaluate on, or None.
        tokenizer: the tokenizer, with the run's chat template and end-of-sequence token.
    """

    train: ReadRows
    evaluation: ReadRows | None
    tokenizer: PreTrainedTokenizerBase


def load_rows(arguments: TrainArguments, kept: tuple[str, ...] = ()) -> LoadedRows:
    """Load and check the rows of a run, for what its objective makes of them.

    Args:
        arguments: of the run.
        kept: columns to carry along with prompts.

    Raises:
        DataError: a row is broken.
        ConfigError: tokenizer and data do not go together.
    """
    run = arguments.run
    train = _read(_source(arguments, run.dataset or [], run.dataset_split, kept))
    evaluation = None
    if run.eval_dataset:
        evaluation = _read(_source(arguments, run.eval_dataset, run.eval_split, kept))
    elif run.validation_split is not None:
        left, drawn = held_out(train.rows, run.validation_split, arguments.training.seed)
        evaluation = replace(train, rows=drawn)
        train = replace(train, rows=left)
    formats = {one.format for one in (train, evaluation) if one is not None}
    return LoadedRows(train, evaluation, _tokenizer(arguments, formats))


def _read(source: Source) -> ReadRows:
    rows, format = load_source(source)
    return ReadRows(rows, format, source)


def _tokenised(read: ReadRows, *how: Any) -> Dataset:
    with placing(read.source):
        return tokenised(read.rows, read.format, *how)


@contextmanager
def placing(source: Source) -> Iterator[None]:
    """Name the file and the line of a row that the chat template refuses."""
    try:
        yield
    except RefusedRow as refused:
        raise DataError(f"{place_of(refused.row, source)}: {refused}") from None


def require_rows(data: TrainingData, arguments: TrainArguments) -> None:
    """Raise a DataError where there is nothing to learn within `max_length`."""
    limit = arguments.training.max_length
    if data.counts.dropped == len(data.train) and not arguments.training.packing:
        raise DataError(f"no row is left: every prompt fills max_length ({limit} tokens)")


def notes(data: TrainingData, arguments: TrainArguments) -> list[str]:
    """Say what becomes of the rows that is not plain to see."""
    limit, packing = arguments.training.max_length, arguments.training.packing
    rows, counts = len(data.train), data.counts
    found = []
    if rows > data.written:
        found.append(
            f"the chat template renders an answer otherwise once others follow: {data.written} "
            f"conversations are {rows} rows, one an answer (--supervise last: one a conversation)"
        )
    if counts.dropped and not packing:
        within = f" within max_length ({limit})" if limit is not None else ""
        found.append(f"{counts.dropped} of {rows} rows are left out: nothing to learn{within}")
    cut = counts.longer if packing else counts.cut
    if cut and not (packing and arguments.training.packing_strategy != "bfd"):
        found.append(f"{cut} of {rows} rows are cut to max_length ({limit})")
    end = last_token(data)
    if conversational(data.format) and not _is_special(data.tokenizer, end):
        found.append(
            f"the chat template ends an answer with {end!r} and no end token: the tuned model may "
            "not stop; give a template that writes one with chat_template_path"
        )
    return [f"note: {note}" for note in found]


def last_token(data: TrainingData) -> str:
    """Return the last token that is supervised in the first row."""
    labels = [label for label in data.train[0]["labels"] if label >= 0]
    return str(data.tokenizer.convert_ids_to_tokens(labels[-1])) if labels else ""


def _is_special(tokenizer: PreTrainedTokenizerBase, token: str) -> bool:
    added = tokenizer.added_tokens_decoder.values()
    return token in tokenizer.all_special_tokens or any(
        str(known) == token and known.special for known in added
    )


def _source(
    arguments: TrainArguments, names: list[str], split: str, kept: tuple[str, ...]
) -> Source:
    run = arguments.run
    columns = Columns(
        prompt=run.prompt_column or "prompt",
        completion=run.completion_column or "completion",
        messages=run.messages_column or "messages",
        text=getattr(arguments.training, "dataset_text_field", "text"),  # an option of SFT
    )
    return Source(
        names,
        split,
        run.dataset_config,
        run.dataset_format,
        run.dataset_template,
        columns,
        run.dataset_weights if names is run.dataset else None,
        arguments.training.seed,
        PURPOSES[run.objective],
        kept,
    )


def _tokenizer(arguments: TrainArguments, formats: set[str]) -> PreTrainedTokenizerBase:
    options, training = arguments.model, arguments.training
    name = str(options.model_name_or_path)
    start = adapter_at(name, arguments.run.objective)
    if start is not None:
        tokenizer = load_tokenizer_of(start)
    else:
        tokenizer = load_tokenizer(
            name,
            revision=options.model_revision,
            trust_remote_code=training.trust_remote_code,
        )
    if arguments.run.objective == "sft":  # the others have it from the model they begin with
        _set_up(tokenizer, training)
    if not tokenizer.eos_token:
        raise ConfigError("the tokenizer has no end-of-sequence token: name one with eos_token")
    if any(map(conversational, formats)) and not tokenizer.chat_template:
        raise ConfigError(
            "the rows are messages, but the tokenizer has no chat template: give one with "
            "chat_template_path"
        )
    return tokenizer


def _set_up(tokenizer: PreTrainedTokenizerBase, training: SFTConfig) -> None:
    """Give a tokenizer the run's end-of-sequence token and chat template."""
    if training.eos_token is not None:
        if training.eos_token not in tokenizer.get_vocab():
            raise ConfigError(f"eos_token {training.eos_token!r} is no token of the tokenizer")
        tokenizer.eos_token = training.eos_token
    if training.chat_template_path:
        tokenizer.chat_template = _template(Path(training.chat_template_path))


def _template(path: Path) -> str:
    if path.suffix not in (".jinja", ".j2"):
        raise ConfigError("chat_template_path: expected a .jinja file (new tokens are not trained)")
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"chat_template_path {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat_template_path {path}: not UTF-8") from error
