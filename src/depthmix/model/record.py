"""`routing`: a context manager that records what the router does."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from depthmix.charts import colour, require_charts
from depthmix.errors import DepthmixError
from depthmix.model.runtime import runtime_of

if TYPE_CHECKING:
    import altair as alt
    from transformers import PreTrainedTokenizerBase


@dataclass
class RoutingRecord:
    """Gates that `routing` collected.

    Attributes:
        layers: places of the k late layers in the model's list of layers.
        gates: one tensor (batch, tokens, k) a forward, detached; (batch, k) of a classifier that
            pools its tokens. Padding is not left out.
        ids: the tokens of each forward, (batch, tokens); None where the model got none, or its
            trunk alone was called.
    """

    layers: tuple[int, ...]
    gates: list[Float[Tensor, "b *t k"]] = field(default_factory=list)
    ids: list[Int[Tensor, "b t"] | None] = field(default_factory=list)

    def mean(self) -> Float[Tensor, " k"]:
        """Return the mean weight of each late layer over all recorded tokens.

        Raises:
            DepthmixError: nothing was recorded.
        """
        self._require_gates()
        return torch.cat([gate.flatten(0, -2) for gate in self.gates]).mean(dim=0)

    def table(self, tokenizer: PreTrainedTokenizerBase | None = None) -> list[dict[str, Any]]:
        """Return a line for each token and late layer.

        Columns: `forward`, `row` (of the batch), `position` (in the row, over the forwards of a
        generation), `token` (its text, or its number where there is no tokenizer; the weights are
        those with which the model predicts what follows it), `layer`, `weight`.

        Raises:
            DepthmixError: nothing was recorded.
        """
        self._require_gates()
        lines: list[dict[str, Any]] = []
        position = 0
        for forward, gate in enumerate(self.gates):
            tokens = gate if gate.ndim == 3 else gate.unsqueeze(1)
            texts = self._texts(forward, tokens.shape[:2], tokenizer)
            for row, place in itertools.product(*map(range, tokens.shape[:2])):
                weights = tokens[row, place].tolist()
                token = texts[row][place]
                where = {"forward": forward, "row": row, "position": position + place}
                lines += [
                    {**where, "token": token, "layer": layer, "weight": weight}
                    for layer, weight in zip(self.layers, weights, strict=True)
                ]
            position += tokens.shape[1]
        return lines

    def plot(self, tokenizer: PreTrainedTokenizerBase | None = None, row: int = 0) -> alt.Chart:
        """Return a chart of one row, token by token: how its weight is cut among the layers.

        Notebooks show it by themselves; `.save("routing.png")` writes it.

        Raises:
            DepthmixError: nothing was recorded.
            ConfigError: altair is not installed.
        """
        require_charts("plot")
        import altair as alt

        names = [f"layer {layer}" for layer in self.layers]
        lines = [
            {**line, "layer": f"layer {line['layer']}", "token": repr(line["token"])[1:-1]}
            for line in self.table(tokenizer)
            if line["row"] == row
        ]
        labels = {str(line["position"]): line["token"] for line in lines}
        chart: alt.Chart = (
            alt.Chart(alt.Data(values=lines))
            .mark_bar()
            .encode(
                x=alt.X(
                    "position:O",
                    title="weights with which the model predicts what follows",
                    axis=alt.Axis(labelExpr=f"{json.dumps(labels)}[datum.value]", labelAngle=-60),
                ),
                y=alt.Y("weight:Q", scale=alt.Scale(domain=[0, 1])),
                color=colour("layer", names),
                order=alt.Order("layer:N"),
                tooltip=["token:N", "layer:N", alt.Tooltip("weight:Q", format=".3f")],
            )
            .properties(height=160)
        )
        return chart

    def _texts(
        self, forward: int, shape: Sequence[int], tokenizer: PreTrainedTokenizerBase | None
    ) -> list[list[str]]:
        """Return what each token of a forward is called."""
        ids = self.ids[forward] if forward < len(self.ids) else None
        rows, width = shape
        if ids is None or width > ids.shape[1]:  # a classifier pools; virtual tokens have no ids
            return [[""] * width for _ in range(rows)]
        kept = ids[:, -width:].tolist()
        if tokenizer is None:
            return [[str(token) for token in row] for row in kept]
        return [[str(tokenizer.decode([token])) for token in row] for row in kept]

    def _require_gates(self) -> None:
        if not self.gates:
            raise DepthmixError("no forward was recorded: run the model within the block")


@contextmanager
def routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record the gate of every forward of `model` within the block.

    Example::

        with depthmix.routing(model) as record:
            model.generate(**inputs)
        record.mean()                      # (k,)
        record.plot(tokenizer)             # a chart, token by token

    A forward in training mode with labels makes no mixture of all tokens and is not recorded.

    Raises:
        DepthmixError: no MoDE is attached to the model.
    """
    runtime = runtime_of(model)
    record = RoutingRecord(runtime.anatomy.layer_indices)
    runtime.records.append(record.gates)
    handle = runtime.host.register_forward_hook(partial(_note_ids, record), with_kwargs=True)
    try:
        yield record
    finally:
        handle.remove()
        # By identity: two empty lists are equal.
        runtime.records = [gates for gates in runtime.records if gates is not record.gates]


def _note_ids(
    record: RoutingRecord, _host: nn.Module, _args: Any, kwargs: dict[str, Any], _output: Any
) -> None:
    """Keep the tokens of a forward beside its gate, which stands last."""
    missing = len(record.gates) - len(record.ids)
    if missing:
        record.ids += [None] * (missing - 1)
        record.ids.append(kwargs.get("input_ids"))
