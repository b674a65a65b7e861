"""The rows of a report: those that a run was evaluated on, or others, and what the model writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.analysis.observations import ObservedRow
from depthmix.carry.run_record import CONFIG_NAME
from depthmix.carry.saved_run import SavedRun
from depthmix.data.gym import is_gym
from depthmix.errors import ConfigError, DataError
from depthmix.inference.complete import window_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_CUT = 1024  # tokens of a row, where the run says nothing


@dataclass(frozen=True)
class Held:
    """Held-out rows.

    Attributes:
        rows: the rows.
        notes: what became of them that is not plain to see.
    """

    rows: list[ObservedRow]
    notes: list[str]


def rows_of(
    run: SavedRun,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    split: str,
    format: str,
    most: int,
) -> Held:
    """Return up to so many rows of each data set, tokenised as in training, and cut as there.

    Args:
        run: whose rows they are, or whose model is to see them.
        tokenizer: of the model.
        sources: data sets; none for the rows that the run was evaluated on.
        split: of the data sets.
        format: of their rows; auto to tell it.
        most: how many rows of each, the first ones.

    Raises:
        ConfigError: the run has no rows of its own.
        DataError: they are others than those of the run, or broken.
    """
    if sources:
        sets = {
            name: _loaded(run, tokenizer, source, split, format)
            for name, source in zip(_names(sources), sources, strict=True)
        }
    else:
        sets = {"evaluation": _own(run)}
    limit = run.record.facts.get("options", {}).get("max_length") or _CUT
    notes, rows = [], []
    for name, data in sets.items():
        if len(data) > most:
            notes.append(f"{name}: the first {most} of {len(data)} rows (--rows)")
        taken = data.select(range(min(most, len(data))))
        longer = sum(len(row["input_ids"]) > limit for row in taken)
        if longer:
            notes.append(f"{name}: {longer} rows are cut to {limit} tokens, as in training")
        rows += [_row(row, name, limit) for row in taken]
    learned = [row for row in rows if any(row.supervised)]
    if not learned:
        raise DataError(f"no row has a token to learn within {limit} tokens")
    if len(learned) < len(rows):
        notes.append(f"{len(rows) - len(learned)} rows have no token to learn, and are left out")
    return Held(learned, notes)


def generated(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ObservedRow],
    max_new_tokens: int,
) -> list[ObservedRow]:
    """Return the prompts of rows with what the model writes after them, greedily."""
    import torch

    written = []
    for row in rows:
        prompt = list(row.ids[: list(row.supervised).index(True)])
        room = (window_of(model) or len(prompt) + max_new_tokens) - len(prompt)
        if not prompt or room < 1:
            continue
        ids = torch.tensor([prompt], device=model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=min(max_new_tokens, room),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )[0].tolist()
        learned = [place >= len(prompt) for place in range(len(output))]
        written.append(ObservedRow(output, learned, row.source, generated=True, in_full=True))
    return written


def in_full(rows: Sequence[ObservedRow]) -> list[ObservedRow]:
    """Return rows of which every token is to be looked at."""
    return [replace(row, in_full=True) for row in rows]


def _own(run: SavedRun) -> Dataset:
    """Return the rows that a run was evaluated on, made once more as `depthmix train` made them."""
    from depthmix.train.arguments import parse
    from depthmix.train.data import prepare_data
    from depthmix.train.record import digest_of

    home = next((f for f in (run.folder, run.folder.resolve().parent) if _has_config(f)), None)
    recorded = (run.record.facts.get("data") or {}).get("eval")
    if home is None or not recorded:
        raise ConfigError(
            f"{run.name}: no evaluation rows are recorded: give held-out data, "
            f"depthmix report {run.name} DATA"
        )
    arguments = parse([str(home / CONFIG_NAME)])
    rows = prepare_data(arguments).evaluation
    if rows is None or len(rows) != recorded["rows"] or not _same(rows, recorded, digest_of(rows)):
        raise DataError(
            f"{run.name}: its evaluation rows are not what they were in training: give held-out "
            f"data, depthmix report {run.name} DATA"
        )
    return rows


def _same(rows: Dataset, recorded: dict[str, Any], digest: str) -> bool:
    """Tell whether rows are those of the record; of rows that training cut it cannot be told."""
    return digest == recorded["digest"] or max(map(len, rows["input_ids"])) > _CUT


def _has_config(folder: Path) -> bool:
    return (folder / CONFIG_NAME).exists()


def _loaded(
    run: SavedRun, tokenizer: PreTrainedTokenizerBase, source: str, split: str, format: str
) -> Dataset:
    from depthmix.data.load import Source, load_source
    from depthmix.data.tokens import tokenised

    rows, name = load_source(Source([source], split, format=format, template=run.record.template))
    return tokenised(rows, name, tokenizer, run.record.options.get("supervise") or "assistant")


def _row(row: dict[str, list[int]], source: str, limit: int) -> ObservedRow:
    learned = [label >= 0 for label in row["labels"][:limit]]
    return ObservedRow(row["input_ids"][:limit], learned, source)


def _names(sources: Sequence[str]) -> list[str]:
    """Return short names of data sets, or all of each where two would have one."""
    short = [_short(source) for source in sources]
    return short if len(set(short)) == len(short) else list(sources)


def _short(source: str) -> str:
    if is_gym(source):
        return source.partition(":")[2].partition("?")[0]
    return Path(source).name.partition(".")[0] or source
