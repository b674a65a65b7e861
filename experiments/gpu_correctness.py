"""Is depthmix right on this device: every dtype, the fused loss, decoding, compilation, 4 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import depthmix
from depthmix.bench.loss import naive_loss
from depthmix.method.fused_loss import ensemble_loss
from depthmix.method.head import LinearHead, LogitTransform

Row = dict[str, Any]
Dtype = torch.dtype

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative errors that rounding explains.
LIMITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def correctness(model: str) -> list[Row]:
    """Return one row a check: how far off it is, and how far it may be."""
    return [
        {"check": name, "error": error, "limit": limit, "right": error <= limit}
        for name, error, limit in _checks(model)
    ]


def _checks(model: str) -> Iterator[tuple[str, float, float]]:
    for dtype, limit in LIMITS.items():
        name = str(dtype).removeprefix("torch.")
        for part, error in _loss_errors(dtype).items():
            yield f"fused loss, {part}, {name}", error, limit
        loaded = _attached(model, dtype)
        yield f"k = 1 is the model's own loss, {name}", _own_loss_error(model, dtype), limit
        yield f"checkpointing changes no gradient, {name}", _checkpointing_error(loaded), limit
        yield f"a padded batch decodes as single rows, {name}", _decoding_error(loaded), 0.0
        if dtype == torch.float32:
            yield "compiled logits, float32", _compiled_error(loaded), limit
    if DEVICE.type == "cuda" and find_spec("bitsandbytes"):
        yield "4 bits: loss against its own dequantised base", _four_bit_error(model), 5e-2


def _loss_errors(dtype: Dtype) -> dict[str, float]:
    """Return the errors of the loss and its gradients against the naive loss in fp64."""
    generator = torch.Generator().manual_seed(0)
    tokens, k, width, vocabulary = 257, 3, 256, 5003

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(DEVICE)

    weight = (0.05 * random(vocabulary, width)).to(dtype)
    states, gate = random(tokens, k, width).to(dtype), random(tokens, k).softmax(-1)
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE)

    def of(loss: Callable[..., Tensor], exact: bool) -> tuple[Tensor, ...]:
        wanted = [
            t.detach().to(torch.float64 if exact else t.dtype).requires_grad_()
            for t in (states, gate, weight)
        ]
        total = loss(*wanted)
        return (total.detach(), *torch.autograd.grad(total, wanted))

    def fused(states: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        head = LinearHead(weight, None)
        return ensemble_loss(states, gate, labels, head, LogitTransform(), 1.0).total

    def naive(states: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return naive_loss(states, gate, labels, weight)

    names = ("value", "gradient of states", "gradient of gate", "gradient of head")
    pairs = zip(of(fused, exact=False), of(naive, exact=True), strict=True)
    return {name: _relative(*pair) for name, pair in zip(names, pairs, strict=True)}


def _attached(model: str, dtype: Dtype, **loading: Any) -> Any:
    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, **loading)
    if not loading:
        base = base.to(DEVICE)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    config = depthmix.MoDEConfig(k=3, distill_fraction=1.0)
    loaded = depthmix.attach(base, config, lora)
    with torch.no_grad():  # some begin at zero, which would hide what they do
        for parameter in loaded.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return loaded


def _batch(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (4, 40), generator=generator).to(DEVICE)
    labels = ids.clone()
    labels[:, :20] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _own_loss_error(model: str, dtype: Dtype) -> float:
    base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    base.to(DEVICE)
    batch = _batch(base)
    with torch.no_grad():
        own = base(**batch).loss
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    ours = depthmix.attach(base, depthmix.MoDEConfig(k=1), lora).train()(**batch).loss
    return _relative(ours.detach(), own.double())


def _checkpointing_error(model: Any) -> float:
    def gradients() -> Tensor:
        model.zero_grad()
        model.train()(**_batch(model)).loss.backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    model.gradient_checkpointing_disable()
    return _relative(again, plain)


@torch.no_grad()
def _decoding_error(model: Any) -> float:
    """Return the share of rows whose greedy tokens differ, left-padded in a batch and alone."""
    model.eval()
    ids = _batch(model)["input_ids"][:, :12]
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 3, 5, 7)):
        mask[row, :pad] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    batched = model.generate(input_ids=ids * mask, attention_mask=mask, **options)[:, -8:]
    differ = 0
    for row in range(len(ids)):
        alone = ids[row, mask[row] == 1].unsqueeze(0)
        single = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **options)
        differ += not torch.equal(single[0, -8:], batched[row])
    return differ / len(ids)


@torch.no_grad()
def _compiled_error(model: Any) -> float:
    batch = _batch(model)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    plain = model.eval()(**inputs).logits
    # Without a GPU, a compiler of C++ would be asked for: there, only the tracing is tried.
    backend = "inductor" if DEVICE.type == "cuda" else "aot_eager"
    compiled: Any = torch.compile(model, dynamic=False, backend=backend)
    logits = compiled(**inputs).logits
    torch.compiler.reset()
    return _relative(logits, plain.double())


def _four_bit_error(model: str) -> float:
    quantisation = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    loading = {"quantization_config": quantisation, "device_map": {"": 0}}
    quantised = _attached(model, torch.bfloat16, **loading)
    batch = _batch(quantised)
    loss = quantised.train()(**batch).loss
    loss.backward()
    if not all(p.grad.isfinite().all() for p in quantised.parameters() if p.grad is not None):
        return float("inf")
    quantised.get_base_model().dequantize()
    return _relative(loss.detach(), quantised(**batch).loss.detach().double())


def _relative(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))
