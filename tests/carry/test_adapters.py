"""PEFT carries MoDE: every kind of tuning method, either order, two adapters, disable, merge."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import LlamaForCausalLM

import depthmix
from depthmix.carry.adapters import mode_only_config
from depthmix.errors import ConfigError, DepthmixError
from models import tiny_model

# PEFT's own LN tuning warns of every norm it tunes.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

CONFIG = depthmix.MoDEConfig(k=3)
IDS = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(5))
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", **CAUSAL, **changes)


METHODS = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL
    ),
    "vera": lambda: VeraConfig(r=4, target_modules=["q_proj", "o_proj"], **CAUSAL),
    "ln_tuning": lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"], **CAUSAL),
    "prompt": lambda: PromptTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=3, **CAUSAL),
    "mode": mode_only_config,
}


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return tiny_model("llama").eval()


def attach(base: LlamaForCausalLM, peft_config: PeftConfig, before: bool = True) -> PeftModel:
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    if before:
        return depthmix.attach(model, CONFIG, peft_config)
    return depthmix.attach(get_peft_model(model, peft_config), CONFIG)


def train(model: PeftModel, steps: int = 3) -> None:
    """A few steps that move every trainable parameter."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def mode_parameters(model: PeftModel) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if "depthmix" in n and p.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_method_trains_saves_loads_and_is_disabled(
    base: LlamaForCausalLM, tmp_path: Path, method: str
) -> None:
    model = attach(base, METHODS[method]())
    assert mode_parameters(model), "MoDE is not trainable"
    fresh = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model)
    unmoved = [n for n, p in model.named_parameters() if n in fresh and torch.equal(p, fresh[n])]
    assert unmoved == []
    model.save_pretrained(tmp_path)
    loaded = depthmix.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))
    assert not torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("method", METHODS)
def test_order_of_attach_does_not_matter(base: LlamaForCausalLM, method: str) -> None:
    before, after = (attach(base, METHODS[method](), before=order) for order in (True, False))
    # The order decides which random numbers each part starts from.
    after.load_state_dict(before.state_dict())
    for model in (before, after):
        torch.manual_seed(2)  # of the tokens to distil on
        train(model)
    names = {n for n, p in before.named_parameters() if p.requires_grad}
    assert names == {n for n, p in after.named_parameters() if p.requires_grad}
    torch.testing.assert_close(logits(before), logits(after), rtol=0, atol=1e-6)


def test_prompt_learning_attached_first_is_disabled_too(base: LlamaForCausalLM) -> None:
    model = copy.deepcopy(base)
    depthmix.attach(model, CONFIG)
    wrapped = get_peft_model(
        model, PromptTuningConfig(num_virtual_tokens=3, modules_to_save=["depthmix"], **CAUSAL)
    )
    train(wrapped)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(base))


def test_full_fine_tuning_round_trip(base: LlamaForCausalLM, tmp_path: Path) -> None:
    model = depthmix.attach(copy.deepcopy(base), CONFIG)
    train(model)
    model.save_pretrained(tmp_path)
    reloaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(depthmix.load(reloaded, tmp_path)), logits(model))
    with pytest.raises(depthmix.DepthmixError, match="whole fine-tuned model"):
        depthmix.load(copy.deepcopy(base), tmp_path)


@pytest.mark.parametrize("method", ["lora", "ia3", "vera"])
def test_merge_keeps_mode(base: LlamaForCausalLM, method: str) -> None:
    model = attach(base, METHODS[method]())
    train(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert isinstance(merged, LlamaForCausalLM)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    depthmix.detach(merged)
    assert "depthmix" not in dict(merged.named_children())


def test_two_adapters_each_have_a_mode_of_their_own(base: LlamaForCausalLM, tmp_path: Path) -> None:
    model = attach(base, lora())
    train(model)
    first = logits(model)
    model.add_adapter("second", lora(modules_to_save=["depthmix"]))
    model.set_adapter("second")
    train(model, steps=5)
    second = logits(model)
    assert not torch.equal(first, second)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(depthmix.load(copy.deepcopy(base), tmp_path / "second")), second)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)


def test_rows_of_a_batch_through_different_adapters_are_refused(base: LlamaForCausalLM) -> None:
    model = attach(base, lora()).eval()
    with pytest.raises(DepthmixError, match="adapter_names"):
        model(input_ids=IDS, adapter_names=["__base__"] * len(IDS))


def test_adapter_loaded_beside_another(base: LlamaForCausalLM, tmp_path: Path) -> None:
    other = attach(base, lora())
    train(other)
    other.save_pretrained(tmp_path)
    model = attach(base, lora())
    with pytest.warns(UserWarning, match="depthmix"):
        model.load_adapter(str(tmp_path), "other")
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "opt", "phi"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "vera"])
def test_late_layers_only_of_every_anatomy(model_type: str, method: str) -> None:
    """PEFT lists the targets of some types by their full names, past `layers_to_transform`."""
    config = lora(use_dora=method == "dora")
    if method == "ia3":
        config = IA3Config(target_modules="all-linear", feedforward_modules=[], **CAUSAL)
    if method == "vera":
        config = VeraConfig(r=4, target_modules=["q_proj", "query_key_value"], **CAUSAL)
    model = depthmix.attach(tiny_model(model_type), CONFIG, config, late_layers_only=True)
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "depthmix" not in n]
    assert trained
    assert {int(re.search(r"layers\.(\d+)\.", name)[1]) for name in trained} == {1, 2, 3}


def test_late_layers_only(base: LlamaForCausalLM) -> None:
    model = depthmix.attach(copy.deepcopy(base), CONFIG, lora(), late_layers_only=True)
    layers = {
        int(n.split("layers.")[1].split(".")[0])
        for n, _ in model.named_parameters()
        if "lora_" in n
    }
    assert layers == {1, 2, 3}
    seen: list[bool] = []
    first = model.get_base_model().model.layers[0]
    first.register_forward_hook(lambda m, a, o: seen.append(o.requires_grad))
    train(model, steps=1)
    assert seen == [False], "the graph reaches below the late layers"
    with pytest.raises(ConfigError, match="cannot be restricted"):
        depthmix.attach(copy.deepcopy(base), CONFIG, METHODS["prompt"](), late_layers_only=True)
    with pytest.raises(ConfigError, match="needs a peft_config"):
        depthmix.attach(copy.deepcopy(base), CONFIG, late_layers_only=True)


def test_method_that_saves_nothing_else_is_refused(base: LlamaForCausalLM) -> None:
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=2, **CAUSAL)
    with pytest.raises(ConfigError, match="modules_to_save"):
        depthmix.attach(copy.deepcopy(base), CONFIG, config)


def test_peft_config_for_a_peft_model_is_refused(base: LlamaForCausalLM) -> None:
    model = get_peft_model(copy.deepcopy(base), lora())
    with pytest.raises(DepthmixError, match="PeftModel already"):
        depthmix.attach(model, CONFIG, lora())


def test_detach_from_a_peft_model_leaves_plain_lora(base: LlamaForCausalLM, tmp_path: Path) -> None:
    model = attach(base, lora())
    train(model)
    with torch.no_grad():
        depthmix.detach(model)
    model.save_pretrained(tmp_path)
    assert "depthmix" not in json.loads((tmp_path / "adapter_config.json").read_text())
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(plain), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mode_stays_in_fp32_on_any_base(base: LlamaForCausalLM, dtype: torch.dtype) -> None:
    model = depthmix.attach(copy.deepcopy(base).to(dtype), CONFIG, lora())
    model.to(torch.bfloat16)
    assert {p.dtype for p in mode_parameters(model).values()} == {torch.float32}
    train(model)
    assert all(p.any() for p in mode_parameters(model).values())


def test_trainable_and_saved_parameters_are_few(base: LlamaForCausalLM, tmp_path: Path) -> None:
    model = attach(base, mode_only_config())
    names = {n.rpartition("default.")[2]: p.numel() for n, p in mode_parameters(model).items()}
    d = base.config.hidden_size
    rank = CONFIG.adaptation_rank
    assert names == {
        "norm.scale": 3 * d,
        "norm.down": 3 * d * rank,
        "norm.up": 3 * d * rank,
        "router.weight": 3 * d,
        "router.bias": 3,
    }
    total = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == 6 * d + 3 + 6 * d * rank
