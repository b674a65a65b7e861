"""The mixture as inference needs it: all linear maps of a layer in one, and constants folded in."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from depthmix.method.mixture import DepthMixture


def folded(mixture: DepthMixture, temperature: float = 1.0) -> dict[str, Tensor]:
    """Return the parameters of the exported `DepthMixture`, in fp32.

    maps   (k, d, m + k)  what is multiplied with a state of layer j: its map, and the router's part
    bias   (k,)           of the router, with its prior
    scale  (k, 1, d)      1 + scale_j; not with `adaptation: affine`, which has
    shift  (k, 1, d)      its bias instead, and its scale in `maps`
    up     (k, r, d)      back from a map of rank r; with `adaptation: low_rank`

    Args:
        mixture: trained parameters.
        temperature: by which what enters the head is divided.
    """
    config, norm, router = mixture.config, mixture.norm, mixture.router
    d = router.weight.shape[-1] // (config.k if config.router_input == "all" else 1)
    scale = torch.ones(config.k, d, device=router.bias.device) / temperature
    if config.adaptation != "none":
        scale = scale * (1 + norm.scale)
    scale = scale.unsqueeze(1)
    maps = router.weight.new_zeros(config.k, d, 0)
    parameters = {"bias": router.bias + router.prior, "scale": scale}
    if config.adaptation == "low_rank":
        maps = norm.down
        parameters["up"] = norm.up / temperature
    if config.adaptation == "affine":
        maps = norm.map / temperature + parameters.pop("scale").squeeze(1).diag_embed()
        parameters["shift"] = norm.bias.unsqueeze(1) / temperature
    parameters["maps"] = torch.cat([maps, _router_columns(mixture, d)], dim=-1)
    return {name: tensor.detach().contiguous() for name, tensor in parameters.items()}


def described(mixture: DepthMixture) -> dict[str, Any]:
    """Return the arguments of the exported `DepthMixture`, beside the shapes of its parameters."""
    config = mixture.config
    kind = config.adaptation if config.adaptation in ("affine", "low_rank") else "scale"
    return {"kind": kind, "router_input": config.router_input, "top_k": config.router_top_k}


def _router_columns(mixture: DepthMixture, d: int) -> Float[Tensor, "k d k"]:
    """Return the router's weight, by the layer whose state it reads."""
    config, weight = mixture.config, mixture.router.weight
    if config.router_input == "all":
        return weight.view(config.k, config.k, d).permute(1, 2, 0)
    columns = weight.new_zeros(config.k, d, config.k)
    columns[-1 if config.router_input == "last" else 0] = weight.T
    return columns
