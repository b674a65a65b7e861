"""`Report`: all that a page says, gathered from a run's logs and one pass over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthmix.analysis.observations import Observations, ObservedRow
from depthmix.analysis.observe import observe
from depthmix.analysis.parts_of_speech import load_tagger
from depthmix.analysis.predictors import (
    Complement,
    PredictorScore,
    agreement,
    complements,
    names_of,
    score_predictors,
)
from depthmix.analysis.routing import Difference, Grouping, differences, groupings
from depthmix.analysis.token_classes import Pieces
from depthmix.analysis.training_log import TrainingLog
from depthmix.analysis.verdict import Finding, findings
from depthmix.carry.saved_run import Holds, SavedRun
from depthmix.errors import ConfigError
from depthmix.report.data import generated, in_full, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN_TOKENS = 10_000


@dataclass(frozen=True)
class Options:
    """What a report is to look at.

    Attributes:
        sources: held-out data sets; none for the rows that the run was evaluated on.
        split: of the data sets.
        format: of their rows; auto to tell it.
        rows: how many rows of each data set.
        shown: how many of them are shown token by token.
        generate: how many prompts are answered.
        max_new_tokens: of an answer.
        all_layers: look at every layer, not at the late ones alone.
        permutations: of the tests against chance.
        seed: of the permutations.
        pos: pipeline of spaCy that tells parts of speech; None to leave them out.
    """

    sources: Sequence[str] = ()
    split: str = "test"
    format: str = "auto"
    rows: int = 100
    shown: int = 20
    generate: int = 4
    max_new_tokens: int = 64
    all_layers: bool = False
    permutations: int = 9_999
    seed: int = 0
    pos: str | None = None


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        name: of the run.
        record: what training wrote down.
        log: of the training, if there is one.
        rows: held-out rows, with those that the model wrote behind them.
        seen: what was seen of the held-out rows.
        shown: what was seen of the rows that are shown token by token.
        pieces: the text of the tokens.
        findings: on the failures of the paper.
        groups: in which the routing was looked at; none without MoDE.
        table: the routing of each group.
        left_out: what there is not, and why.
    """

    name: str
    record: dict[str, Any]
    log: TrainingLog | None
    rows: list[ObservedRow]
    seen: Observations
    shown: Observations
    pieces: Pieces
    findings: list[Finding]
    groups: list[Grouping]
    table: list[Difference]
    left_out: list[str]

    @property
    def scores(self) -> list[PredictorScore]:
        """How well each layer and the model do."""
        return score_predictors(self.seen)

    @property
    def complements(self) -> list[Complement]:
        """The tokens that a late layer gets right and the last one wrong."""
        return complements(self.seen)

    def tables(self) -> dict[str, Any]:
        """Return all figures as plain values: a list of objects a table."""
        return {
            "run": self.name,
            "findings": [vars(finding) for finding in self.findings],
            "log": [vars(point) for point in (self.log.points if self.log else ())],
            "layers": [vars(score) for score in self.scores],
            "agreement": {
                "predictors": names_of(self.seen),
                "shares": agreement(self.seen).tolist(),
            },
            "late_layers": list(self.seen.late),
            "routing": [vars(line) for line in self.table],
            "left_out": self.left_out,
            "record": self.record,
        }


def make_report(
    run: SavedRun, model: Any, tokenizer: PreTrainedTokenizerBase, options: Options
) -> Report:
    """Look at a run.

    Args:
        run: the run.
        model: its model, ready for inference.
        tokenizer: of the model.
        options: what to look at.

    Raises:
        DepthmixError: there are no rows, or the model is of a kind that cannot be looked at.
    """
    tagger = None if options.pos is None else load_tagger(options.pos)
    sources = options.sources
    held = rows_of(run, tokenizer, sources, options.split, options.format, options.rows)
    shown = _shown(held.rows, options.shown)
    places = [row for row in held.rows if not any(row is other for other in shown)]
    rows = [*in_full(shown), *places]
    answers = generated(model, tokenizer, shown[: options.generate], options.max_new_tokens)
    everything = observe(model, [*rows, *answers], options.all_layers)
    seen = everything.where(everything.row < len(rows))
    visible = (everything.row < len(shown)) | (everything.row >= len(rows))
    log = TrainingLog.read(run)
    groups = groupings(seen, rows, tokenizer, tagger) if seen.late else []
    table = differences(seen.gate, seen.row, groups, options.permutations, options.seed)
    return Report(
        name=run.name,
        record=run.record.facts,
        log=log,
        rows=[*rows, *answers],
        seen=seen,
        shown=everything.where(visible),
        pieces=Pieces(tokenizer),
        findings=findings(seen, log),
        groups=groups,
        table=table,
        left_out=[*held.notes, *_left_out(seen, log, options, len(shown))],
    )


def _shown(rows: Sequence[ObservedRow], most: int) -> list[ObservedRow]:
    """Return the rows that are shown: the first of each data set in turn, as long as they fit."""
    by_source: dict[str, list[ObservedRow]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    shown: list[ObservedRow] = []
    tokens = 0
    for row in _in_turn(list(by_source.values()))[:most]:
        tokens += len(row.ids)
        if tokens > _SHOWN_TOKENS:
            break
        shown.append(row)
    return shown


def _in_turn(lists: Sequence[list[ObservedRow]]) -> list[ObservedRow]:
    longest = max(map(len, lists))
    return [rows[i] for i in range(longest) for rows in lists if i < len(rows)]


def _left_out(
    seen: Observations, log: TrainingLog | None, options: Options, shown: int
) -> list[str]:
    notes = []
    if not seen.late:
        notes.append("there is no mixture in this model (no MoDE, or k = 1): no routing to look at")
    if log is None:
        notes.append("the folder holds no trainer_state.json: there are no curves of the training")
    if shown < options.shown and shown < len(set(seen.row.tolist())):
        notes.append(f"{shown} rows are shown, which have {_SHOWN_TOKENS:,} tokens together")
    return notes


def require_reportable(run: SavedRun) -> None:
    """Raise `ConfigError` for an export, which has no layers to look at one by one."""
    if run.holds is Holds.EXPORT:
        raise ConfigError(f"{run.name}: an export: report the run that it was made of")
