"""`DepthMixture`, the trainable part of MoDE: normed states in, a mixture and a gate out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from depthmix.config import MoDEConfig
from depthmix.errors import CheckpointError

MODULE_NAME = "depthmix"  # attribute of the model that carries MoDE, and key of its tensors


class DepthMixture(nn.Module):
    """The norms of the late layers and the router (arXiv 2410.13077, section 3).

    With the model's final norm N_0 already applied, layer j contributes

        y_j = N_0(h_j) * (1 + scale_j)  [+ map_j N_0(h_j)]

    All start at zero, so that y_j = N_0(h_j) bit for bit, weight decay pulls towards the
    pretrained norm, and one rule serves every class of norm. The mixture is sum_j g_j y_j; since
    the head is linear and the weights add up to 1, one head call on it gives the ensemble's logits.

    The parameters stay in fp32 whatever the model's dtype: in bf16 an update of 1e-3 to a weight
    near 1 is lost. The module holds no reference to the model, so that PEFT can copy it. The
    buffer `spec` is JSON in UTF-8 (configuration and base model), so that a checkpoint tells what
    it is.

    With k = 1 there is nothing to mix: no parameters, and nothing is saved.

    Args:
        config: the configuration.
        hidden_size: width d of the hidden states.
        spec: JSON object that travels with the weights.
    """

    spec: Tensor

    def __init__(self, config: MoDEConfig, hidden_size: int, spec: dict[str, Any]) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("spec", _encode(spec), persistent=config.k > 1)
        # PEFT takes over the `weight` of every module that it puts back when it merges.
        self.register_buffer("weight", torch.empty(0), persistent=False)
        if config.k > 1:
            self.norm = LayerAdaptation(config, hidden_size)
            self.router = Router(config, hidden_size)

    def adapt(
        self, normed: Float[Tensor, "*b k d"], hold_router: bool = False
    ) -> tuple[Float[Tensor, "*b k d"], Float[Tensor, "*b k"]]:
        """Return the adapted state of every late layer and their weights, in fp32 (fp64 stays).

        Args:
            normed: output of the model's final norm for each late layer, the last layer last.
            hold_router: give the router a zero gradient (warm-up phase).
        """
        normed = normed.to(torch.promote_types(normed.dtype, torch.float32))
        if self.config.k == 1:
            return normed, torch.ones_like(normed[..., 0])
        # Autocast would run the router in bf16, where close layers become indistinguishable.
        with torch.autocast(normed.device.type, enabled=False):
            states, gate = self.norm(normed), self.router(normed)
        # Zero, not none: data-parallel training waits for the gradient of every parameter.
        return states, gate.detach() + 0.0 * gate if hold_router else gate

    def forward(
        self, normed: Float[Tensor, "*b k d"], hold_router: bool = False
    ) -> tuple[Float[Tensor, "*b d"], Float[Tensor, "*b k"]]:
        """Return the mixture, in the dtype of `normed`, and the gate."""
        states, gate = self.adapt(normed, hold_router)
        return mix(states, gate).to(normed.dtype), gate

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DepthMixture:
        """Move to devices, but keep the dtype: `model.to(torch.bfloat16)` must not round it."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take over the loaded spec, whose length may differ, if it describes the same module.

        The configuration stays: what the loss is to be was chosen when MoDE was attached.
        """
        loaded = state_dict.get(prefix + "spec")
        if loaded is not None:
            _require_same_module(self.config, MoDEConfig.from_dict(read_spec(loaded)["config"]))
            self.spec = torch.empty_like(loaded, device=self.spec.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


def mix(states: Float[Tensor, "*b k d"], gate: Float[Tensor, "*b k"]) -> Float[Tensor, "*b d"]:
    """Return sum_j g_j y_j. Not a matmul, which TF32 would round: one-hot gates stay exact."""
    return (gate.unsqueeze(-1) * states).sum(dim=-2)


class LayerAdaptation(nn.Module):
    """What each late layer does to its normed state before the shared head."""

    def __init__(self, config: MoDEConfig, hidden_size: int) -> None:
        super().__init__()
        k, d = config.k, hidden_size
        if config.adaptation != "none":
            self.scale = nn.Parameter(torch.zeros(k, d))
        if config.adaptation == "affine":
            self.map = nn.Parameter(torch.zeros(k, d, d))
            self.bias = nn.Parameter(torch.zeros(k, d))
        if config.adaptation == "low_rank":
            rank = min(config.adaptation_rank, d)
            # As in LoRA: one factor random, one zero, so that the product starts at zero. Drawn
            # apart, so that with one seed the tuning method starts alike with MoDE and without.
            generator = torch.Generator().manual_seed(torch.initial_seed())
            self.down = nn.Parameter(torch.randn(k, d, rank, generator=generator) / d**0.5)
            self.up = nn.Parameter(torch.zeros(k, rank, d))
        self._adaptation = config.adaptation

    def forward(self, normed: Float[Tensor, "*b k d"]) -> Float[Tensor, "*b k d"]:
        """Return y_j for every late layer; see `DepthMixture`."""
        if self._adaptation == "none":
            return normed
        dtype = normed.dtype
        adapted = torch.addcmul(normed, normed, self.scale.to(dtype))
        if self._adaptation == "norm":
            return adapted
        if self._adaptation == "affine":
            adapted = adapted + self.bias
        k, d = normed.shape[-2:]
        rows = normed.movedim(-2, 0).reshape(k, -1, d)  # one product for the maps of all layers
        onto = adapted.movedim(-2, 0).reshape(k, -1, d)
        if self._adaptation == "affine":
            mapped = torch.baddbmm(onto, rows, self.map.to(dtype))
        else:
            inner = torch.bmm(rows, self.down.to(dtype))
            mapped = torch.baddbmm(onto, inner, self.up.to(dtype))
        return mapped.view(k, *normed.shape[:-2], d).movedim(0, -2)


class Router(nn.Module):
    """k weights a token: softmax(x W + b + prior), x a normed state scaled to length 1.

    On a state of length ~sqrt(d) one Adam step can move a logit by lr x d, and the router
    collapses onto the last layer within a few steps; on a state of length 1 by lr x sqrt(d).
    W and b start at zero and the prior is a constant, so that weight decay pulls towards it.
    """

    prior: Tensor

    def __init__(self, config: MoDEConfig, hidden_size: int) -> None:
        super().__init__()
        width = hidden_size * (config.k if config.router_input == "all" else 1)
        self.weight = nn.Parameter(torch.zeros(config.k, width))
        self.bias = nn.Parameter(torch.zeros(config.k))
        self.register_buffer("prior", _prior_logits(config), persistent=False)
        self._input = config.router_input
        self._top_k = config.router_top_k

    def forward(self, normed: Float[Tensor, "*b k d"]) -> Float[Tensor, "*b k"]:
        """Return the gate of every token."""
        x = F.normalize(self._select(normed), dim=-1)
        logits = F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)) + self.prior
        if self._top_k is not None:
            kept = logits.topk(self._top_k, dim=-1).indices
            masked = torch.full_like(logits, float("-inf"))
            logits = masked.scatter(-1, kept, logits.gather(-1, kept))
        return logits.softmax(dim=-1)

    def _select(self, normed: Float[Tensor, "*b k d"]) -> Tensor:
        if self._input == "all":
            return normed.flatten(-2)
        return normed[..., -1 if self._input == "last" else 0, :]


_MODULE_FIELDS = (
    "k",
    "adaptation",
    "adaptation_rank",
    "router_input",
    "router_top_k",
    "router_prior",
)


def _require_same_module(ours: MoDEConfig, loaded: MoDEConfig) -> None:
    different = [f for f in _MODULE_FIELDS if getattr(ours, f) != getattr(loaded, f)]
    if different:
        listed = ", ".join(
            f"{name} = {getattr(loaded, name)!r} (attached: {getattr(ours, name)!r})"
            for name in different
        )
        raise CheckpointError(
            f"the saved MoDE has {listed}; attach with the saved configuration, or "
            "use depthmix.load"
        )


def read_spec(spec: Tensor) -> dict[str, Any]:
    """Decode the `spec` buffer of a `DepthMixture`."""
    return json.loads(bytes(spec.tolist()).decode())  # type: ignore[no-any-return]


def _encode(spec: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(spec).encode()), dtype=torch.uint8)


def _prior_logits(config: MoDEConfig) -> Tensor:
    logits = torch.zeros(config.k)
    if config.router_prior is not None and config.k > 1:
        odds = config.router_prior / (1 - config.router_prior)
        logits[-1] = torch.tensor(odds * (config.k - 1)).log()
    return logits
