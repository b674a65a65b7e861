"""What is saved comes back bit for bit in a fresh process, or an error says what is wrong."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import depthmix
from depthmix.errors import CheckpointError
from models import tiny_model

IDS = torch.tensor([[5, 6, 7, 8, 9]])
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def saved(base_folder: Path, tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A trained adapter and the logits of its model."""
    base = LlamaForCausalLM.from_pretrained(base_folder)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    config = depthmix.MoDEConfig(k=2, router_prior=0.7, adaptation="low_rank", router_input="all")
    model = depthmix.attach(base, config, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        return tmp_path, model.eval()(IDS).logits


def change(folder: Path, edit: str) -> str:
    """Break one tensor of a saved adapter; return its name."""
    tensors = load_file(folder / WEIGHTS)
    name = next(n for n in tensors if n.endswith("router.weight"))
    tensor = tensors.pop(name)
    if edit == "misshapen":
        tensors[name] = tensor[:, :-1].contiguous()
    if edit == "extra":
        tensors[name] = tensor
        name = "base_model.model.depthmix.surplus"
        tensors[name] = tensor.clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return name


def test_fresh_process_gives_the_same_logits(
    base_folder: Path, saved: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    script = f"""
import torch, depthmix
from transformers import LlamaForCausalLM
model = depthmix.load(LlamaForCausalLM.from_pretrained({str(base_folder)!r}), {str(saved[0])!r})
logits = model.eval()(torch.tensor({IDS.tolist()})).logits.detach()
torch.save(logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), saved[1])


def test_configuration_travels_with_the_weights(
    base_folder: Path, saved: tuple[Path, torch.Tensor]
) -> None:
    model = depthmix.load(LlamaForCausalLM.from_pretrained(base_folder), saved[0])
    config = model.get_base_model().depthmix_runtime.mixture().config
    assert config == depthmix.MoDEConfig(
        k=2, router_prior=0.7, adaptation="low_rank", router_input="all"
    )
    described = json.loads((saved[0] / "adapter_config.json").read_text())
    assert described["load_with_depthmix.load"] == {"config": config.to_dict()}


def test_loaded_adapter_is_frozen_unless_asked(
    base_folder: Path, saved: tuple[Path, torch.Tensor]
) -> None:
    for trainable in (False, True):
        base = LlamaForCausalLM.from_pretrained(base_folder)
        model = depthmix.load(base, saved[0], is_trainable=trainable)
        assert any(p.requires_grad for p in model.parameters()) is trainable


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_plain_peft_warns(base_folder: Path, saved: tuple[Path, torch.Tensor]) -> None:
    base = LlamaForCausalLM.from_pretrained(base_folder)
    with pytest.warns(UserWarning, match="depthmix"):
        PeftModel.from_pretrained(base, saved[0])


@pytest.mark.parametrize("edit", ["missing", "misshapen", "extra"])
def test_broken_tensor_is_named(
    base_folder: Path, saved: tuple[Path, torch.Tensor], edit: str
) -> None:
    name = change(saved[0], edit)
    with warnings.catch_warnings(), pytest.raises(CheckpointError, match=f"{name}"):
        depthmix.load(LlamaForCausalLM.from_pretrained(base_folder), saved[0])


@pytest.mark.parametrize("difference", ["weights", "shape", "type"])
def test_wrong_base_is_named(saved: tuple[Path, torch.Tensor], difference: str) -> None:
    torch.manual_seed(9)
    if difference == "weights":
        other, message = tiny_model("llama"), "other weights in embeddings.weight"
    elif difference == "shape":
        other, message = tiny_model("llama", num_hidden_layers=5), "last_layer is 4, saved with 3"
    else:
        other, message = tiny_model("mistral"), "model_type is 'mistral'"
    with pytest.raises(CheckpointError, match=message):
        depthmix.load(other, saved[0])


def test_base_in_another_dtype_is_the_same_base(
    base_folder: Path, saved: tuple[Path, torch.Tensor]
) -> None:
    base = LlamaForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16)
    logits = depthmix.load(base, saved[0]).eval()(IDS).logits
    torch.testing.assert_close(logits.float(), saved[1], rtol=0.1, atol=0.1)


def test_truncated_file_is_named(base_folder: Path, saved: tuple[Path, torch.Tensor]) -> None:
    path = saved[0] / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=WEIGHTS):
        depthmix.load(LlamaForCausalLM.from_pretrained(base_folder), saved[0])


def test_folder_without_mode(base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors"):
        depthmix.load(LlamaForCausalLM.from_pretrained(base_folder), tmp_path)
    with pytest.raises(CheckpointError, match="no MoDE"):
        depthmix.load(LlamaForCausalLM.from_pretrained(base_folder), base_folder)


def test_other_configuration_is_refused_by_load_state_dict(
    base_folder: Path, saved: tuple[Path, torch.Tensor]
) -> None:
    base = LlamaForCausalLM.from_pretrained(base_folder)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    config = depthmix.MoDEConfig(k=2, adaptation="low_rank", router_input="all")
    model = depthmix.attach(base, config, lora)
    with (
        pytest.warns(UserWarning, match="depthmix"),
        pytest.raises(CheckpointError, match=r"router_prior = 0\.7 \(attached: 0\.9\)"),
    ):
        model.load_adapter(str(saved[0]), "other")


def test_model_left_as_it_was_after_a_failed_load(
    base_folder: Path, saved: tuple[Path, torch.Tensor]
) -> None:
    base = tiny_model("llama")
    untouched = copy.deepcopy(base).eval()(IDS).logits
    with pytest.raises(CheckpointError):
        depthmix.load(base, saved[0])
    assert torch.equal(base.eval()(IDS).logits, untouched)
