"""Rows in the form that the trainer of an objective takes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from depthmix.data.conversation import Render, reads_parts, renderer, renders_tools
from depthmix.data.fields import Row
from depthmix.data.formats import EXTRAS, conversational
from depthmix.data.tokens import RefusedRow
from depthmix.errors import ConfigError, DataError
from depthmix.inference.form import appends_eos
from depthmix.train.arguments import TrainArguments
from depthmix.train.data import ReadRows, load_rows, notes, placing, prepare_data, require_rows
from depthmix.train.objectives.prepared import Prepared
from depthmix.train.objectives.rewards import Reward, carried, rewards_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def prepare(arguments: TrainArguments) -> Prepared:
    """Load, check and prepare the data of a run.

    Raises:
        DataError: a row is broken, or there is nothing to learn.
        ConfigError: tokenizer, data and rewards do not go together.
    """
    makers = {"sft": _answers, "dpo": _pairs, "grpo": _prompts}
    return makers[arguments.run.objective](arguments)


def _answers(arguments: TrainArguments) -> Prepared:
    data = prepare_data(arguments)
    require_rows(data, arguments)
    return Prepared(
        data.train, data.evaluation, data.format, data.tokenizer, notes(data, arguments)
    )


def _pairs(arguments: TrainArguments) -> Prepared:
    with arguments.training.main_process_first(desc="data"):
        loaded = load_rows(arguments)
        train, evaluation = (
            None
            if read is None
            else _for_trl(read, ("prompt", "chosen", "rejected"), loaded.tokenizer)
            for read in (loaded.train, loaded.evaluation)
        )
    assert train is not None
    return Prepared(train, evaluation, loaded.train.format, loaded.tokenizer)


def _prompts(arguments: TrainArguments) -> Prepared:
    from depthmix.train.objectives.reward_figures import RewardFigures

    rewards = rewards_of(arguments.run)
    columns = tuple(dict.fromkeys(column for reward in rewards for column in reward.columns))
    with arguments.training.main_process_first(desc="data"):
        loaded = load_rows(arguments, columns)
        train, evaluation = (
            None if read is None else _with_columns(read, columns, loaded.tokenizer)
            for read in (loaded.train, loaded.evaluation)
        )
    assert train is not None
    for read in (loaded.train, loaded.evaluation):
        _require_answers(read, rewards)
    figures = RewardFigures(arguments.training.reward_weights or [1.0] * len(rewards))
    return Prepared(
        train,
        evaluation,
        loaded.train.format,
        loaded.tokenizer,
        prompts=prompt_ids(train, loaded.tokenizer),
        further={"reward_funcs": figures.watching(rewards)},
        figures=figures,
    )


def _with_columns(
    read: ReadRows, columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Return prompts, and beside them what the rewards read."""
    rows = _for_trl(read, ("prompt",), tokenizer)
    return rows.rename_columns({name: carried(name) for name in columns})


def prompt_ids(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of prompts, as TRL's GRPOTrainer makes them.

    Raises:
        ConfigError: the tokenizer ends every prompt.
    """
    prompts: list[Any] = list(rows["prompt"])
    if isinstance(prompts[0], str):
        if appends_eos(tokenizer):
            raise ConfigError("the tokenizer ends every text, so that no prompt could be answered")
        return list(tokenizer(prompts)["input_ids"])
    encoded: Any = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(encoded["input_ids"])


def _for_trl(
    read: ReadRows, messages: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Return rows with messages in place of the JSON that they are read as, once all render."""
    rows = read.rows
    if not conversational(read.format):
        return rows
    if reads_parts(tokenizer):
        raise ConfigError(
            "the chat template takes content as parts alone, which objective sft knows how to give"
        )
    if "tools" in rows.column_names and not renders_tools(tokenizer):
        raise DataError("the rows have tools, but the chat template leaves them out")
    with placing(read.source):
        for row in rows:
            _require_rendered(row, messages, tokenizer)
    from datasets import Json

    for column in (*messages, *(name for name in EXTRAS if name in rows.column_names)):
        rows = rows.cast_column(column, Json())
    if "chat_template_kwargs" in rows.column_names:  # TRL takes no null
        rows = rows.map(_without_null, desc="Filling chat_template_kwargs")
    return rows


def _without_null(row: Row) -> Row:
    return {"chat_template_kwargs": row["chat_template_kwargs"] or {}}


def _require_rendered(
    written: Row, messages: tuple[str, ...], tokenizer: PreTrainedTokenizerBase
) -> None:
    values = {name: json.loads(value) for name, value in written.items() if value is not None}
    render: Render = renderer(tokenizer, values.get("tools"), values.get("chat_template_kwargs"))
    prompt, *answers = (values[name] for name in messages)
    try:
        render(prompt, True)
        for answer in answers:
            render([*prompt, *answer], False)
    except DataError as error:
        raise RefusedRow.of(written, error) from None


def _require_answers(read: ReadRows | None, rewards: list[Reward]) -> None:
    """Refuse rows of which no answer could be rewarded."""
    if read is None:
        return
    with placing(read.source):
        for row in read.rows:
            for reward in rewards:
                try:
                    reward.require(_values(reward, row))
                except DataError as error:
                    raise RefusedRow.of(row, error) from None


def _values(reward: Reward, row: Row) -> Row:
    return {name: json.loads(row[name]) for name in reward.columns}
