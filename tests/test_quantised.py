"""Quantised base models: bitsandbytes' own 4 and 8 bits, and a head without any float weight."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import depthmix
from depthmix.cli import main
from models import attached, tiny_model, token_ids

IDS = token_ids()


def train_once(base: Any) -> tuple[Any, torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = depthmix.attach(base, depthmix.MoDEConfig(k=3), lora).train()
    with torch.no_grad():  # some start at zero, which would stop the gradients of others
        for weight in filter(lambda weight: weight.requires_grad, model.parameters()):
            weight.add_(0.02 * torch.randn_like(weight))
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return model, loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="`make optional` installs bitsandbytes"
)


@pytest.mark.optional
@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits: int, tmp_path: Path) -> None:
    """Loss and gradients are the written-out model's; an adapter comes back onto a fresh base."""
    wide = {"hidden_size": 64, "intermediate_size": 128}  # a block of bitsandbytes is 64 weights
    tiny_model("llama", **wide).save_pretrained(tmp_path / "base")
    quantisation = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)

    def quantised() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantisation, dtype=torch.float32
        )

    model, loss, gradients = train_once(quantised())
    _, expected_loss, expected = train_once(quantised().dequantize())
    tolerance = 1e-4 if bits == 4 else 3e-2  # 8 bits round the activations as well
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=tolerance)
    for name, gradient in gradients.items():
        likeness = nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), 0)
        assert likeness > 1 - tolerance, (name, likeness, gradient.abs().max())

    model.save_pretrained(tmp_path / "tuned")
    again = depthmix.load(quantised(), tmp_path / "tuned")
    with torch.no_grad():
        found, kept = again(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(found, kept)


class Int8Linear(nn.Module):
    """A frozen linear layer with int8 weights, as bitsandbytes and torchao have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).T


@pytest.mark.optional
@needs_bitsandbytes
def test_command_trains_on_four_bits(tiny: str, rows: str, tmp_path: Path) -> None:
    """TRL rounds what is trained to bf16; MoDE stays in fp32, where small updates count."""
    options = ["--model_name_or_path", tiny, "--dataset", rows, "--load_in_4bit"]
    steps = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"]
    assert main(["train", *options, *steps, "--output_dir", str(tmp_path / "out")]) == 0
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    dtypes = {
        weight.dtype
        for name, weight in weights.items()
        if "depthmix" in name and not name.endswith("spec")
    }
    assert dtypes == {torch.float32}
    assert torch.bfloat16 in {weight.dtype for weight in weights.values()}


def test_quantised_head_and_layers() -> None:
    """No float weight to read anywhere: the head is called as a module."""
    quantised = tiny_model("llama")
    for name, module in list(quantised.named_modules()):
        if isinstance(module, nn.Linear):
            owner = quantised.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], Int8Linear(module))
    quantised.requires_grad_(False)
    whole = copy.deepcopy(quantised)
    for name, module in list(whole.named_modules()):
        if isinstance(module, Int8Linear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(module.weight * module.scale, requires_grad=False)
            owner = whole.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], linear)
    losses, gradients = [], []
    for source in (quantised, whole):
        torch.manual_seed(2)
        model = attached(source, k=3).train()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss)
        gradients.append(model.depthmix.router.weight.grad)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)
