"""Prefill and the latency of one token: base, merged LoRA, with MoDE, with k naive heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import depthmix
from depthmix.bench.measure import allocated_bytes, median_seconds
from depthmix.bench.training import Setting
from depthmix.model.runtime import runtime_of
from depthmix.pretrained import to_device

BASE, MERGED, MODE, NAIVE = "base", "merged lora", "merged lora + mode", "naive k heads"


@torch.no_grad()
def measure_decoding(
    setting: Setting, prompt: int, tokens: int, repeats: int
) -> dict[str, dict[str, Any]]:
    """Return what a prefill of `prompt` tokens, and one token after it, cost each variant.

    The figures: median `prefill_seconds`; `prefill_peak_bytes`, of tensors, above the model; median
    `token_seconds`.
    """
    models = {
        BASE: setting.load(),
        MERGED: _merged(setting.load(), None),
        MODE: _merged(setting.load(), setting.k),
    }
    forwards: dict[str, Callable[..., Any]] = {n: to_device(m) for n, m in models.items()}
    forwards[NAIVE] = _with_naive_heads(models[MODE])
    ids = _prompt(models[BASE], prompt)
    prefills = {name: _prefill(forward, ids) for name, forward in forwards.items()}
    peaks = {name: allocated_bytes(call) for name, call in prefills.items()}
    prefill = median_seconds(prefills, repeats, warm_up=False)
    decode = median_seconds({n: _decode(f, ids, tokens) for n, f in forwards.items()}, repeats)
    return {
        name: {
            "prefill_seconds": prefill[name],
            "prefill_peak_bytes": peaks[name],
            "token_seconds": decode[name] / tokens,
        }
        for name in forwards
    }


def decoding_calls(setting: Setting, prompt: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """Return a prefill and a decoding of so many tokens, with MoDE beside a merged LoRA."""
    forward = to_device(_merged(setting.load(), setting.k))
    ids = _prompt(forward, prompt)
    prefill, decode = torch.no_grad()(_prefill(forward, ids)), _decode(forward, ids, tokens)
    return {"prefill": prefill, "decoding": torch.no_grad()(decode)}


def _prompt(model: Any, tokens: int) -> Tensor:
    """Return the ids of a prompt of so many tokens, on the model's device."""
    ids = torch.arange(tokens, device=model.device).unsqueeze(0)
    return ids.remainder(model.config.vocab_size)


def _merged(model: Any, k: int | None) -> Any:
    """Return the model with a LoRA merged into it, and MoDE beside it if k is given."""
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    if k is None:
        return get_peft_model(model, lora).merge_and_unload()
    return depthmix.attach(model, depthmix.MoDEConfig(k=k), lora).merge_and_unload()


def _prefill(forward: Callable[..., Any], ids: Tensor) -> Callable[[], Any]:
    return lambda: forward(ids, use_cache=True, logits_to_keep=1)


def _decode(forward: Callable[..., Any], ids: Tensor, tokens: int) -> Callable[[], None]:
    """Return a call that decodes greedily after the prompt, whose cache is made beforehand."""
    output = forward(ids, use_cache=True, logits_to_keep=1)

    def run() -> None:
        cache, logits = output.past_key_values, output.logits
        for _ in range(tokens):
            token = logits[:, -1:].argmax(-1)
            logits = forward(token, past_key_values=cache, use_cache=True).logits
        cache.crop(-tokens)

    return run


def _with_naive_heads(model: Any) -> Callable[..., Any]:
    """Return a forward that runs the head on the state of every late layer, then mixes logits."""
    runtime = runtime_of(model)
    mixture, head = runtime.mixture(), model.get_output_embeddings()
    assert mixture is not None
    norm = model.get_submodule(runtime.anatomy.norm_path)
    layers = [model.get_submodule(path) for path in runtime.anatomy.layer_paths]

    def forward(*args: Any, **kwargs: Any) -> Any:
        states: list[Tensor] = []
        handles = [
            layer.register_forward_hook(lambda _m, _a, output: states.append(output))
            for layer in layers
        ]
        hook = norm._forward_hooks.popitem()
        try:
            output = model(*args, **kwargs)
        finally:
            norm._forward_hooks.update([hook])
            for handle in handles:
                handle.remove()
        kept = kwargs.get("logits_to_keep", 0)
        normed = torch.stack([norm.forward(state[:, -kept:]) for state in states], dim=-2)
        layer_states, gate = mixture.adapt(normed)
        output.logits = (gate.unsqueeze(-1) * head(layer_states)).sum(-2)
        return output

    return forward
