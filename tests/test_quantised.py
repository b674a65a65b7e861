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
from command_fixtures import build_tokenizer
from depthmix.carry.saved_run import SavedRun
from depthmix.cli import main
from depthmix.inference.form import Form
from depthmix.inference.loading import load_for_use
from depthmix.pretrained import Loading
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


def has_avx512bf16() -> bool:
    if find_spec("bitsandbytes") is None:
        return False
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


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


@pytest.mark.optional
@needs_bitsandbytes
def test_a_model_is_used_in_four_bits(tmp_path: Path) -> None:
    """Logits are those of the same model with its four bits written out as floats."""
    tuned = attached(tiny_model("llama", hidden_size=64, intermediate_size=128), k=3)
    tuned.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    run, four_bits = SavedRun.find(str(tmp_path)), Loading(load_in_4bit=True, dtype="float32")
    used, _ = load_for_use(run, Form("text"), loading=four_bits)
    written_out = AutoModelForCausalLM.from_pretrained(tmp_path, **four_bits.options()).dequantize()
    whole = depthmix.load(written_out, tmp_path).eval()
    plain, _ = load_for_use(run, Form("text"))
    with torch.no_grad():
        found, expected, unquantised = (model(IDS).logits for model in (used, whole, plain))

    def distance(logits: torch.Tensor) -> float:
        return float((logits - expected).norm() / expected.norm())

    assert distance(found) < 0.04  # the kernels for CPUs are of bf16, scales of blocks as well
    assert distance(unquantised) > 0.1


@pytest.mark.optional
@needs_bitsandbytes
@pytest.mark.skipif(not has_avx512bf16(), reason="repacks four bits on CPUs with AVX512-BF16")
def test_layers_that_cannot_be_repacked_are_refused(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", tiny, "--prompt", "What", "--load-in-4bit"]) == 2
    said = capsys.readouterr().err
    assert "--load-in-4bit: bitsandbytes runs layers of 64 x n inputs" in said
    assert "model.layers.0.self_attn.q_proj has 32 and 32" in said


@pytest.mark.optional
@needs_bitsandbytes
def test_no_training_on_weights_that_an_evaluation_repacks(
    tiny: str, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--load_in_4bit"]
    argv += ["--eval_dataset", rows, "--output_dir", str(tmp_path / "out"), "--use_cpu"]
    assert main(argv) == 2
    assert "load_in_4bit: on a CPU an evaluation repacks the weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
