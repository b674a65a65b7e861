"""What is saved comes back bit for bit in a fresh process, or an error says what is wrong."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import depthmix
from depthmix.carry.adapters import with_mode
from depthmix.carry.card import write_card
from depthmix.carry.checkpoint import Checkpoint
from depthmix.errors import CheckpointError
from depthmix.model.runtime import runtime_of
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


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(
        **({"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | changes)
    )


def moved(model: Any) -> Any:
    """Move everything that is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_merged_base_is_another_base(base_folder: Path, tmp_path: Path) -> None:
    """Same embeddings, other layers: the adapter belongs to the merged model alone."""
    base = LlamaForCausalLM.from_pretrained(base_folder)
    merged = moved(get_peft_model(copy.deepcopy(base), lora())).merge_and_unload()
    model = moved(depthmix.attach(copy.deepcopy(merged), depthmix.MoDEConfig(k=2), lora()))
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"another base.*other weights in model\.layers"):
        depthmix.load(base, tmp_path)
    assert torch.equal(depthmix.load(merged, tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("before", [True, False])
def test_embeddings_that_the_adapter_carries(
    base_folder: Path, tmp_path: Path, before: bool
) -> None:
    base = LlamaForCausalLM.from_pretrained(base_folder)
    config, peft_config = depthmix.MoDEConfig(k=2), lora(modules_to_save=["embed_tokens"])
    if before:
        model = moved(get_peft_model(copy.deepcopy(base), peft_config))
        model = moved(depthmix.attach(model, config))
    else:
        model = moved(depthmix.attach(copy.deepcopy(base), config, peft_config))
    model.save_pretrained(tmp_path)
    assert torch.equal(depthmix.load(base, tmp_path)(IDS).logits, model(IDS).logits)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("before", [True, False])
def test_resized_vocabulary(base_folder: Path, tmp_path: Path, before: bool) -> None:
    """Tokens added to the base and trained with the adapter, before or after `attach`."""

    def grown(model: LlamaForCausalLM) -> LlamaForCausalLM:
        torch.manual_seed(0)
        model.resize_token_embeddings(101, mean_resizing=False)
        return model

    base = LlamaForCausalLM.from_pretrained(base_folder)
    peft_config = lora(modules_to_save=["embed_tokens", "lm_head"])
    config = depthmix.MoDEConfig(k=2)
    if before:
        model = depthmix.attach(grown(copy.deepcopy(base)), config)
    else:
        model = grown(depthmix.attach(copy.deepcopy(base), config))
    moved(get_peft_model(model, with_mode(peft_config))).save_pretrained(tmp_path)
    loaded = depthmix.load(grown(base), tmp_path)
    ids = torch.tensor([[5, 98, 100]])
    torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_name_and_revision_of_the_base_are_remembered(base_folder: Path, tmp_path: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(base_folder)
    base.config._commit_hash = "0123abc"
    depthmix.attach(base, depthmix.MoDEConfig(k=2), lora()).save_pretrained(tmp_path)
    assert Checkpoint(tmp_path).spec()["base"]["revision"] == "0123abc"
    other = LlamaForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    with pytest.raises(CheckpointError, match=rf"{base_folder}, revision 0123abc"):
        depthmix.load(other, tmp_path)


def test_loading_keeps_the_chosen_weight_of_the_distillation(base_folder: Path) -> None:
    """What is learned comes from the file; how strongly to distil is the run's own choice."""
    saved, chosen = (
        depthmix.attach(
            LlamaForCausalLM.from_pretrained(base_folder),
            depthmix.MoDEConfig(k=2, distill_weight=weight),
        )
        for weight in (0.1, 0.7)
    )
    chosen.load_state_dict(moved(saved).state_dict())
    assert chosen.depthmix.config.distill_weight == 0.7
    assert torch.equal(chosen.depthmix.router.weight, saved.depthmix.router.weight)


def test_second_card_keeps_what_stands_below(base_folder: Path, tmp_path: Path) -> None:
    model = depthmix.attach(LlamaForCausalLM.from_pretrained(base_folder), depthmix.MoDEConfig(k=2))
    (tmp_path / "README.md").write_text("# A model\n\nAbove.\n")
    write_card(tmp_path, runtime_of(model))
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\n## Citation\n\nBelow.\n")
    write_card(tmp_path, runtime_of(model))
    text = path.read_text()
    assert text.count("Mixture-of-Depths Ensemble (MoDE)") == 1
    assert text.index("Above.") < text.index("| `k` | `2` |") < text.index("## Citation")
    assert text.rstrip().endswith("Below.")
