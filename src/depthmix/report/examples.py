"""The rows of a page, token by token, and the tokens that a late layer saves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from depthmix.analysis.observations import Observations
from depthmix.analysis.predictors import names_of
from depthmix.report.report import Report

_CONTEXT = 24  # tokens in front of a saved one
_COMPLEMENTS = 20
_LINE_BREAK = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


@dataclass(frozen=True)
class ShownToken:
    """A token of a row.

    Attributes:
        text: as it stands.
        place: in the data of the page; None of the first one, which nothing predicts.
        learned: whether it is one that the model is to learn.
    """

    text: str
    place: int | None
    learned: bool

    @property
    def label(self) -> str | None:
        """What a screen reader says of a token without letters."""
        if self.text.strip(_LINE_BREAK + " \t\n\r"):
            return None
        return "line break" if "\n" in self.text else "blank"


@dataclass(frozen=True)
class ShownRow:
    """A row of the page."""

    number: int
    source: str
    generated: bool
    saved: int
    loss: float
    tokens: list[ShownToken]


@dataclass(frozen=True)
class ShownComplement:
    """A token that a late layer gets right and the last one wrong."""

    before: str
    right: str
    layer: int
    probability: float
    last_said: str
    model_said: str


def shown_rows(report: Report) -> list[ShownRow]:
    """Return the rows that are shown, those that the model wrote last."""
    shown = report.shown
    rows = []
    saves = _saves(shown)
    for number, row in enumerate(np.unique(shown.row).tolist(), 1):
        places = (shown.row == row).nonzero()[0]
        tokens = [ShownToken(_visible(report.pieces[report.rows[row].ids[0]]), None, False)]
        tokens += [
            ShownToken(
                _visible(report.pieces[int(shown.token[place])]),
                int(place),
                bool(shown.supervised[place]),
            )
            for place in places
        ]
        learned = shown.surprise[places][shown.supervised[places]]
        source = report.rows[row]
        saved = int(saves[places].sum())
        loss = float(learned.mean()) if len(learned) else 0.0
        rows.append(ShownRow(number, source.source, source.generated, saved, loss, tokens))
    return rows


def token_data(report: Report) -> dict[str, Any]:
    """Return what the page's script shows of each token: short, since there are thousands."""
    shown = report.shown
    late = max(len(shown.late), 1)
    predictors = slice(len(shown.layers) - late, None)
    top, probability = shown.top[:, predictors], shown.top_probability[:, predictors]
    known = np.unique(top[top >= 0])
    return {
        "layers": list(shown.late),
        "predictors": names_of(shown)[predictors],
        "texts": [_visible(report.pieces[token]) for token in known.tolist()],
        "gates": _rounded(shown.gate, 4),
        "means": _rounded(shown.gate.mean(axis=0), 4) if len(shown.late) else [],
        "surprise": _rounded(shown.surprise, 2),
        "losses": _rounded(shown.loss[:, predictors], 2),
        "saves": _saves(shown).astype(int).tolist(),
        "top": np.searchsorted(known, top).reshape(len(top), -1).tolist(),
        "probability": _rounded(probability.reshape(len(top), -1) * 100, 0),
    }


def shown_complements(report: Report) -> list[ShownComplement]:
    """Return the tokens that another late layer is surest of, with what stands before them."""
    seen, lines = report.seen, []
    for found in report.complements[:_COMPLEMENTS]:
        row, position = int(seen.row[found.place]), int(seen.position[found.place])
        ids = report.rows[row].ids
        before = "".join(report.pieces[t] for t in ids[max(position - _CONTEXT, 0) : position])
        said = [_visible(report.pieces[int(t)]) for t in seen.top[found.place, -2:, 0]]
        right = _visible(report.pieces[int(seen.token[found.place])])
        lines.append(
            ShownComplement(before, right, found.layer, found.probability, said[0], said[1])
        )
    return lines


def _saves(shown: Observations) -> np.ndarray:
    """Tell of each token whether a late layer has it right where the last one has not."""
    late = max(len(shown.late), 1)
    right = shown.right[:, -1 - late : -1]
    saves: np.ndarray = shown.supervised & ~right[:, -1] & right[:, :-1].any(axis=1)
    return saves


def _rounded(values: np.ndarray, digits: int) -> list[Any]:
    """Return numbers as short as JSON has them; whole ones without a point."""
    rounded = np.round(np.nan_to_num(values.astype(np.float64), nan=-1.0), digits)
    numbers: list[Any] = (rounded.astype(int) if digits == 0 else rounded).tolist()
    return numbers


def _visible(text: str) -> str:
    """Show line breaks, which stay what they are."""
    return text.replace("\n", f"{_LINE_BREAK}\n")
