"""LlamaForCausalLM with a mixture-of-depths ensemble (arXiv 2410.13077), for inference.

Written by depthmix VERSION. It reads no file, opens no connection and runs nothing but what is
below: forward hooks keep the states of the last k layers, each passes the final norm and a linear
map of its own, and a router weighs them token by token. Their mixture takes the place of
`last_hidden_state`, so that the head, and whatever engine brings a head of its own, gives the
ensemble's predictions.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

# The forward that runs in a thread: late states by their place, and how many last positions count.
_RUNNING = threading.local()


class DepthMixture(nn.Module):
    """Normed states in, (k, ..., d), the last layer last; their mixture out, (..., d), in fp32.

    With constants folded in, so that a token costs eight operations: `maps` holds the linear map of
    every layer and, in its last k columns, the router; `bias` is the router's, with its prior.
    """

    maps: Tensor  # (k, d, m + k)
    bias: Tensor  # (k,)
    scale: Tensor  # (k, 1, d)
    shift: Tensor  # (k, 1, d)
    up: Tensor  # (k, m, d)

    def __init__(
        self, kind: str, router_input: str, top_k: int | None, shapes: dict[str, list[int]]
    ) -> None:
        super().__init__()
        self.kind, self.router_input, self.top_k = kind, router_input, top_k
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, normed: Tensor) -> Tensor:
        """Return sum_j g_j y_j."""
        with torch.autocast(normed.device.type, enabled=False):
            states = normed.flatten(1, -2).to(self.maps.dtype)  # (k, n, d)
            k = len(states)
            products = torch.bmm(states, self.maps)  # (k, n, m + k)
            gate = self._gate(states, products[..., -k:])
            late = self._late(states, products[..., :-k])
            mixed = torch.bmm(gate.unsqueeze(1), late.transpose(0, 1))
        return mixed.view(normed.shape[1:])

    def _late(self, states: Tensor, products: Tensor) -> Tensor:
        """Return the adapted state y_j of every layer, (k, n, d)."""
        if self.kind == "affine":
            return products + self.shift
        scaled = states * self.scale
        return torch.baddbmm(scaled, products, self.up) if self.kind == "low_rank" else scaled

    def _gate(self, states: Tensor, products: Tensor) -> Tensor:
        """Return the weights of every token, (n, k): the router reads a state of length 1."""
        if self.router_input == "all":
            raw, read = products.sum(dim=0), states.transpose(0, 1).flatten(1)
        else:
            place = -1 if self.router_input == "last" else 0
            raw, read = products[place], states[place]
        length = torch.linalg.vector_norm(read, dim=-1, keepdim=True).clamp_min(1e-12)
        logits = torch.addcdiv(self.bias, raw, length)
        if self.top_k is not None:
            kept = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
        return logits.softmax(dim=-1)


class DepthMixLlamaModel(LlamaModel):
    """The model without its head, whose `last_hidden_state` is the mixture."""

    _keep_in_fp32_modules_strict = {"depthmix"}

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no, or transformers leaves buffers unset that LlamaModel computes."""
        return False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        mode = config.depthmix
        self.depthmix = DepthMixture(**mode["mixture"], shapes=mode["parameters"])
        for place, path in enumerate(mode["layers"]):
            layer = self.get_submodule(path)
            layer.register_forward_hook(functools.partial(_keep, place))
        self.post_init()

    @functools.wraps(LlamaModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run LlamaModel and mix."""
        _RUNNING.states = {}
        output = super().forward(*args, **kwargs)
        states, _RUNNING.states = _RUNNING.states, None
        k = len(self.config.depthmix["layers"])
        if k - 1 not in states:
            return output  # the last layer was left out: an early exit, a stage of a pipeline
        if len(states) < k:
            raise RuntimeError("the late layers must run in one stage of the pipeline")
        last = output[0]
        late = torch.stack([states[place].to(last.device) for place in range(k)])
        norm = self.config.depthmix["norm"]
        mixed = self.depthmix(self.get_submodule(norm)(late) if norm else late).to(last.dtype)
        if mixed.shape != last.shape:  # the last positions alone were asked for
            mixed = torch.cat([last[:, : -mixed.shape[1]], mixed], dim=1)
        if isinstance(output, tuple):
            return (mixed, *output[1:])
        output.last_hidden_state = mixed
        return output


class DepthMixLlamaForCausalLM(LlamaForCausalLM):
    """The model with its head."""

    _keep_in_fp32_modules_strict = {"depthmix"}

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no, or transformers leaves buffers unset that LlamaForCausalLM computes."""
        return False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.model = DepthMixLlamaModel(config)
        self.post_init()

    @functools.wraps(LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run LlamaForCausalLM; states of positions that need no logits are not held."""
        keep = kwargs.get("logits_to_keep")
        _RUNNING.keep = keep if isinstance(keep, int) else 0
        try:
            return super().forward(*args, **kwargs)
        finally:
            _RUNNING.keep = 0


def _keep(place: int, _layer: nn.Module, _args: Any, output: Any) -> None:
    """Forward hook of a late layer."""
    running, keep = getattr(_RUNNING, "states", None), getattr(_RUNNING, "keep", 0)
    if running is not None:  # there is none where gradient checkpointing runs a layer again
        state = output if isinstance(output, Tensor) else output[0]
        running[place] = state[:, -keep:].clone() if keep else state
