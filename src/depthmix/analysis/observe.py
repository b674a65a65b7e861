"""One pass over rows: what the router and every layer do at each token.

The states of a batch go through the head a layer and a chunk of tokens at a time, so that never
more than one layer's logits of a chunk exist beside those that the model itself gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from tqdm import tqdm

from depthmix.analysis.layers import head_logits
from depthmix.analysis.observations import Observations, ObservedRow
from depthmix.config import MoDEConfig
from depthmix.data.batches import batches
from depthmix.errors import ConfigError
from depthmix.method.mixture import DepthMixture
from depthmix.model.active import host_of
from depthmix.model.anatomy import Anatomy, Between, first_tensor
from depthmix.model.discovery import discover
from depthmix.model.runtime import RUNTIME_NAME, runtime_of

TOP = 3  # predictions that are kept of each layer
_CHUNK = 256  # tokens that pass the head at once
_BATCH_TOKENS = 2048
_LENS_LAYERS = 3  # the late layers of a model without MoDE


@torch.no_grad()
def observe(
    model: nn.Module,
    rows: Sequence[ObservedRow],
    all_layers: bool = False,
    batch_tokens: int = _BATCH_TOKENS,
) -> Observations:
    """Run a causal language model over rows, with MoDE or without.

    A late layer is seen as MoDE uses it, through its own norm; any other layer through the model's
    final norm, as a logit lens does.

    Args:
        model: the model, PEFT-wrapped or not; it is set to evaluation mode.
        rows: what to run it on.
        all_layers: look at every layer, not at the late ones alone.
        batch_tokens: padded tokens at a time; a row that has more goes alone.

    Raises:
        ConfigError: the model is no causal language model, or its layers cannot be seen alone.
    """
    model.eval()
    lens = _Lens(model, all_layers)
    parts: list[dict[str, np.ndarray]] = []
    # The first token of a row is not predicted.
    seen = [place for place, row in enumerate(rows) if len(row.ids) > 1]
    together = batches([len(rows[place].ids) for place in seen], batch_tokens)
    for chosen in tqdm(list(together), desc="looking at tokens", unit="batch", leave=False):
        parts.append(_observe_batch(model, lens, rows, [seen[i] for i in chosen]))
    if not parts:
        raise ConfigError("there are no rows with a token to predict")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((whole["position"], whole["row"]))
    return Observations(lens.layers, lens.late, **{n: v[order] for n, v in whole.items()})


def _observe_batch(
    model: nn.Module, lens: _Lens, rows: Sequence[ObservedRow], places: Sequence[int]
) -> dict[str, np.ndarray]:
    width = max(len(rows[i].ids) for i in places)
    ids = torch.zeros(len(places), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, place in enumerate(places):
        length = len(rows[place].ids)
        ids[number, :length], mask[number, :length] = torch.tensor(rows[place].ids), 1
    predicted = mask[:, 1:].bool()
    targets = ids[:, 1:][predicted]
    line, before = predicted.nonzero(as_tuple=True)
    row, position = np.array(places)[line.numpy()], before.numpy() + 1
    supervised = [bool(rows[i].supervised[t]) for i, t in zip(row, position, strict=True)]
    wanted = torch.tensor([s or rows[i].in_full for s, i in zip(supervised, row, strict=True)])
    gate, scores = lens.look(model, ids, mask, predicted, targets, wanted)
    return {
        "row": row,
        "position": position,
        "token": targets.numpy(),
        "supervised": np.array(supervised),
        "gate": gate.cpu().numpy(),
        **{name: values.cpu().numpy() for name, values in scores.items()},
    }


class _Lens:
    """Sees what every layer of a model predicts.

    Args:
        model: the model.
        all_layers: whether layers below the late ones are seen.
    """

    def __init__(self, model: nn.Module, all_layers: bool) -> None:
        self.host: Any = host_of(model)
        self.mixture, self.anatomy = _mixture_and_anatomy(model)
        if not self.anatomy.labels_shifted:
            raise ConfigError(
                f"{type(self.host).__name__} is no causal language model, and a token of a row has "
                "no prediction to look at: record its gates with depthmix.routing, and compare "
                "groups of them with depthmix.analysis.routing.differences"
            )
        late = self.anatomy.layer_indices
        self.late = late if self.mixture is not None else ()
        first = 0 if all_layers else late[0]
        self.layers = tuple(range(first, late[-1] + 1))
        self.plain = self.layers if self.mixture is None else tuple(range(first, late[0]))
        if self.plain and self.anatomy.between is Between.MODULES:
            raise ConfigError(
                "all_layers: more than a norm lies between the layers and the head of "
                f"{type(self.host).__name__}, so that only MoDE's late layers can be seen alone"
            )

    def look(
        self,
        model: nn.Module,
        ids: Int[Tensor, "b t"],
        mask: Int[Tensor, "b t"],
        predicted: Bool[Tensor, "b s"],
        targets: Int[Tensor, " n"],
        wanted: Bool[Tensor, " n"],
    ) -> tuple[Float[Tensor, "n k"], dict[str, Shaped[Tensor, "n p *m"]]]:
        """Return the gates, and loss and likeliest tokens of every predictor, the model last.

        The layers alone predict the wanted tokens only.
        """
        device = self.host.device
        where, targets, wanted = predicted.to(device), targets.to(device), wanted.to(device)
        states: dict[int, Tensor] = {}
        normed: list[Tensor] = []
        with ExitStack() as hooks:
            for layer in self.plain:
                module = self.host.get_submodule(f"{self.anatomy.layers_path}.{layer}")
                keep = _keeping(states, layer, where)
                hooks.callback(module.register_forward_hook(keep).remove)
            if self.mixture is not None:
                handle = self.mixture.register_forward_hook(
                    lambda _module, args, _output: normed.append(_predicting(args[0], where))
                )
                hooks.callback(handle.remove)
            output = model(input_ids=ids.to(device), attention_mask=mask.to(device))
        own = _predicting(output.logits, where)
        del output
        gate = own.new_zeros(len(own), 0)
        if self.mixture is not None:
            late, gate = self.mixture.adapt(normed[0])
            states.update(zip(self.late, late.unbind(dim=1), strict=True))
        scored = [
            _spread(
                _scored(states.pop(at)[wanted], targets[wanted], partial(self._logits, at)), wanted
            )
            for at in self.layers
        ]
        scored.append(_scored(own, targets, Tensor.float))
        names = scored[0]
        return gate.float(), {n: torch.stack([s[n] for s in scored], dim=1) for n in names}

    def _logits(self, layer: int, states: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Return what a layer alone predicts."""
        anatomy = self.anatomy
        if layer in self.plain and anatomy.norm_path is not None:
            states = self.host.get_submodule(anatomy.norm_path)(states)
        return head_logits(self.host, anatomy, states)


def _mixture_and_anatomy(model: nn.Module) -> tuple[DepthMixture | None, Anatomy]:
    """Return the mixture, if the model has one that mixes, and where the model's parts are."""
    host = host_of(model)
    if RUNTIME_NAME in vars(host):
        runtime = runtime_of(model)
        mixture = runtime.mixture()
        if mixture is not None and mixture.config.k > 1:
            return mixture, runtime.anatomy
    count = int(host.config.get_text_config().num_hidden_layers)
    return None, discover(host, MoDEConfig(k=min(_LENS_LAYERS, count)))


def _keeping(states: dict[int, Tensor], layer: int, where: Bool[Tensor, "b s"]) -> Any:
    """Return a forward hook that keeps a layer's states at the wanted places."""

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        state = first_tensor(output)
        assert state is not None
        states[layer] = _predicting(state, where)

    return keep


def _predicting(states: Tensor, where: Bool[Tensor, "b s"]) -> Tensor:
    """Return those states that predict a token of a row; virtual tokens may stand before them."""
    chosen: Tensor = states[:, -where.shape[1] - 1 : -1][where]
    return chosen


def _scored(
    states: Float[Tensor, "n d"],
    targets: Int[Tensor, " n"],
    logits: Callable[[Tensor], Float[Tensor, "c v"]],
) -> dict[str, Tensor]:
    """Score what predicts the targets, a chunk at a time."""
    parts = zip(states.split(_CHUNK), targets.split(_CHUNK), strict=True)
    scores = [_score(logits(chunk), wanted) for chunk, wanted in parts]
    return {name: torch.cat([s[name] for s in scores]) for name in scores[0]}


def _spread(scores: dict[str, Tensor], wanted: Bool[Tensor, " n"]) -> dict[str, Tensor]:
    """Put the scores of the wanted tokens where these are among all."""
    spread = {}
    for name, values in scores.items():
        missing = float("nan") if values.is_floating_point() else -1
        spread[name] = values.new_full((len(wanted), *values.shape[1:]), missing)
        spread[name][wanted] = values
    return spread


def _score(logits: Float[Tensor, "n v"], targets: Int[Tensor, " n"]) -> dict[str, Tensor]:
    log_probs = logits.log_softmax(dim=-1)
    best = log_probs.topk(min(TOP, log_probs.shape[-1]), dim=-1)
    return {
        "loss": -log_probs.gather(1, targets.unsqueeze(1)).squeeze(1),
        "top": best.indices,
        "top_probability": best.values.exp(),
    }
