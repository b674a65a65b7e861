"""What a probe found: a table of 80 columns, JSON, a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.plan.memory import Bill
from depthmix.plan.report import counted
from depthmix.probe.choice import Choice, shares
from depthmix.probe.lens import Prediction
from depthmix.tables import print_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PREDICTED = """\
loss, right: cross-entropy a token and share of tokens right, final norm alone
as last, KL: tokens likeliest as for the last layer; divergence from it, in nats
fitted: through a ridge map to the last layer's state, fitted on every other row
scored: all of these are means over the rows that nothing was fitted on
"""
_GRADIENT = """\
gradient: norm of the gradient of the mean loss, of what is tuned in the layer
held: share of the sum of these norms in the layer and those above
"""
_COST = """\
step, cached, memory: of a step tuned from there on, in the first epoch and in
  later ones from cached depth, relative to all layers (counted, without MoDE)
"""


@dataclass(frozen=True)
class Probe:
    """What each of N layers knows of a task.

    Attributes:
        model: its name.
        data: sources of the rows.
        method: the tuning method.
        rows: that were read.
        tokens: supervised ones in them.
        scored: of those, how many the predictions are means over.
        alone: predictions through the final norm alone.
        fitted: predictions through the fitted maps.
        gradients: (N,) norm of each layer's gradient; empty where layers carry no tuning method.
        bills: of a step with 1 to N last layers tuned; None where they could not be counted.
        choice: what is recommended.
    """

    model: str
    data: list[str]
    method: str
    rows: int
    tokens: int
    scored: int
    alone: Prediction
    fitted: Prediction
    gradients: list[float]
    bills: list[Bill] | None
    choice: Choice

    def as_dict(self) -> dict[str, Any]:
        """Return everything; a layer's costs are those of tuning it and all above it."""
        names = ("model", "data", "method", "rows", "tokens", "scored")
        return {
            **{name: getattr(self, name) for name in names},
            "layers": [self._layer(place) for place in range(len(self.alone.loss))],
            "recommended": asdict(self.choice),
        }

    def _layer(self, place: int) -> dict[str, Any]:
        predicted = {
            how: {name: values[place] for name, values in vars(prediction).items()}
            for how, prediction in (("alone", self.alone), ("fitted", self.fitted))
        }
        entry: dict[str, Any] = {"layer": place + 1, **predicted}
        if self.gradients:
            entry["gradient"] = self.gradients[place]
            entry["gradient_share_from_here"] = shares(self.gradients)[place]
        if self.bills:
            bill = self._bill(place)
            entry["step_flops"], entry["cached_flops"] = bill.flops.step, bill.flops.cached
            entry["step_bytes"], entry["trained"] = bill.memory.total, bill.trained
        return entry

    def _bill(self, place: int) -> Bill:
        """Return the costs of tuning from a layer on."""
        assert self.bills
        return self.bills[len(self.alone.loss) - place - 1]

    def print(self) -> None:
        """Print what layers predict, what tuning from each on takes, and the recommendation."""
        name = Path(self.model).name if Path(self.model).is_dir() else self.model
        places = range(len(self.alone.loss))
        print_figures(
            f"{name}: {self.rows} rows, {self.tokens:,} supervised tokens, {self.scored:,} scored",
            ("layer", "loss", "right", "as last", "KL", "fitted: loss", "right"),
            map(self._predicted, places),
        )
        print(_PREDICTED)
        if self.gradients:
            header = ["from layer", "tuned", "gradient", "held"]
            header += ["trained", "step", "cached", "memory"] if self.bills else []
            print_figures(f"tuning with {self.method}", header, map(self._depth, places))
            print(_GRADIENT + (_COST if self.bills else ""))
        print("\n".join(self.choice.reasons))

    def _predicted(self, place: int) -> list[str]:
        alone, fitted = self.alone, self.fitted
        return [
            str(place + 1),
            f"{alone.loss[place]:.3f}",
            f"{alone.accuracy[place]:.1%}",
            f"{alone.agreement[place]:.1%}",
            f"{alone.divergence[place]:.3f}",
            f"{fitted.loss[place]:.3f}",
            f"{fitted.accuracy[place]:.1%}",
        ]

    def _depth(self, place: int) -> list[str]:
        tuned = len(self.gradients) - place
        cells = [str(place + 1), str(tuned)]
        cells += [f"{self.gradients[place]:.3g}", f"{shares(self.gradients)[place]:.0%}"]
        if self.bills:
            whole, bill = self._bill(0), self._bill(place)
            cached = bill.flops.cached
            cells += [
                counted(bill.trained),
                f"{bill.flops.step / whole.flops.step:.2f}",
                "-" if cached is None else f"{cached / whole.flops.step:.2f}",
                f"{bill.memory.total / whole.memory.total:.2f}",
            ]
        return cells

    def plot(self, path: Path) -> None:
        """Draw losses, accuracy, gradient and costs by layer, the recommendation marked."""
        from matplotlib.figure import Figure

        panels = [self._draw_losses, self._draw_shares]
        panels += [self._draw_gradients] if self.gradients else []
        figure = Figure(figsize=(4.6 * len(panels), 3.6), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
            panel(axes)
            axes.set_xlabel("layer")
            axes.legend(fontsize=7)
        figure.suptitle("; ".join(reason.split(":")[0] for reason in self.choice.reasons))
        figure.savefig(path, dpi=120)

    @property
    def _places(self) -> range:
        return range(1, len(self.alone.loss) + 1)

    def _draw_losses(self, axes: Axes) -> None:
        axes.plot(self._places, self.alone.loss, label="final norm alone", color="#c44e52")
        axes.plot(self._places, self.fitted.loss, label="fitted map", color="#3b6ea5")
        axes.set_title("loss of each layer's own prediction, nats a token", fontsize=9)
        axes.set_yscale("log")
        self._mark(axes, self.choice.k, "late layers")

    def _draw_shares(self, axes: Axes) -> None:
        axes.plot(self._places, self.alone.accuracy, label="right, norm alone", color="#c44e52")
        axes.plot(self._places, self.fitted.accuracy, label="right, fitted map", color="#3b6ea5")
        axes.plot(
            self._places, self.alone.agreement, "--", label="as the last, norm alone", color="#888"
        )
        axes.set_title("share of the tokens", fontsize=9)
        self._mark(axes, self.choice.k, "late layers")

    def _draw_gradients(self, axes: Axes) -> None:
        total = sum(self.gradients)
        norms = [norm / total * len(self.gradients) for norm in self.gradients]
        axes.bar(self._places, norms, label="gradient's norm, mean 1", color="#a8c0da")
        axes.plot(
            self._places, shares(self.gradients), label="share held from here", color="#3b6ea5"
        )
        if self.bills:
            steps = [self._bill(place - 1).flops.step for place in self._places]
            axes.plot(
                self._places, [s / steps[0] for s in steps], label="step tuned from here", color="k"
            )
        axes.set_ylim(0, 1.4 * max(norms))  # room for the legend
        axes.set_title("gradient, and cost of tuning from a layer on", fontsize=9)
        self._mark(axes, self.choice.tuned_layers or 0, "tuned layers")

    def _mark(self, axes: Axes, count: int, label: str) -> None:
        top = len(self.alone.loss) + 0.5
        axes.axvspan(top - count, top, color="#f0d9a8", alpha=0.5, zorder=0, label=label)
