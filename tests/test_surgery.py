"""`attach` and `load` are all or nothing, and change nothing of the caller's."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from peft.utils import get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig

import depthmix
from depthmix import MoDEConfig
from depthmix.errors import ConfigError, DepthmixError, TrainingError
from models import GROUPED, PLAIN, perturb, randomise, tiny_model, token_ids

IDS = token_ids()
CONFIG = MoDEConfig(k=2, **PLAIN)
LATE = (2, 3)


def lora(**changes: Any) -> LoraConfig:
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**(options | changes))


@pytest.fixture
def base() -> LlamaForCausalLM:
    return tiny_model("llama")


def shape_of(model: nn.Module) -> tuple[Any, ...]:
    """Modules, parameters, what is trained, hooks and attributes of a model."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        sorted(vars(model)),
        model.training,
    )


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


FAILING = {
    "a misspelt target": (lora(target_modules=["q_porj"]), False),
    "a method without modules_to_save": (
        AdaptionPromptConfig(adapter_layers=2, adapter_len=2, task_type="CAUSAL_LM"),
        False,
    ),
    "copied layers": (lora(layer_replication=[(0, 4), (2, 4)]), False),
    "a saved module below": (lora(modules_to_save=["embed_tokens"]), True),
    "targets excluded already": (lora(exclude_modules=["v_proj"]), True),
    "a method without layers": (PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2), True),
}


@pytest.mark.parametrize("name", FAILING)
@pytest.mark.filterwarnings("ignore")
def test_failed_attach_leaves_the_model_and_can_be_mended(base: LlamaForCausalLM, name: str):
    peft_config, late = FAILING[name]
    for parameter in base.model.embed_tokens.parameters():
        parameter.requires_grad_(False)
    before, given, expected = shape_of(base), peft_config.to_dict(), logits(base)
    with pytest.raises(Exception, match=r".+"):
        depthmix.attach(base, CONFIG, peft_config, late_layers_only=late)
    assert shape_of(base) == before
    assert peft_config.to_dict() == given
    assert torch.equal(logits(base), expected)
    model = depthmix.attach(base, CONFIG, lora(), late_layers_only=late)
    assert isinstance(model, PeftModel)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()


def test_hooks_of_others_can_be_removed_after_a_failed_attach(base: LlamaForCausalLM):
    calls: list[int] = []
    handle = base.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="No modules were targeted"):
        depthmix.attach(base, CONFIG, lora(target_modules=["q_porj"]))
    calls.clear()
    logits(base)
    handle.remove()
    logits(base)
    assert calls == [1]


def test_failure_within_attach_itself(base: LlamaForCausalLM, monkeypatch: Any):
    def interrupted(_runtime: Any) -> None:
        raise KeyboardInterrupt

    before = shape_of(base)
    monkeypatch.setattr("depthmix.surgery.settle_other_terms", interrupted)
    with pytest.raises(KeyboardInterrupt):
        depthmix.attach(base, CONFIG, lora())
    assert shape_of(base) == before


def test_configuration_of_the_caller_stays_its_own(base: LlamaForCausalLM, tmp_path: Path):
    peft_config = lora()
    before = peft_config.to_dict()
    depthmix.attach(copy.deepcopy(base), CONFIG, peft_config, late_layers_only=True)
    assert peft_config.to_dict() == before
    plain = get_peft_model(copy.deepcopy(base), peft_config)
    plain.save_pretrained(tmp_path)
    assert "depthmix" not in (tmp_path / "adapter_config.json").read_text()
    again = depthmix.attach(copy.deepcopy(base), CONFIG, peft_config, late_layers_only=True)
    assert trained_layers(again) == set(LATE)


def trained_layers(model: nn.Module) -> set[int]:
    names = [n for n, p in model.named_parameters() if p.requires_grad and ".layers." in n]
    return {int(name.partition(".layers.")[2].split(".")[0]) for name in names}


@pytest.mark.parametrize(
    "peft_config",
    [lora(), IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")],
)
def test_late_layers_alone_are_trained(base: LlamaForCausalLM, peft_config: Any):
    model = depthmix.attach(base, CONFIG, peft_config, late_layers_only=True)
    assert trained_layers(model) == set(LATE)


def test_biases_of_all_layers_are_no_late_layers():
    base = tiny_model("qwen2")
    before = shape_of(base)
    with pytest.raises(ConfigError, match=r"tuned_layers: model\.layers\.0.*bias"):
        depthmix.attach(base, CONFIG, lora(bias="all"), late_layers_only=True)
    assert shape_of(base) == before


def test_experts_of_all_layers_are_no_late_layers():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    base = randomise(AutoModelForCausalLM.from_config(MixtralConfig(**(GROUPED | experts))))
    peft_config = lora(target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    before = shape_of(base)
    with pytest.raises(ConfigError, match=r"tuned_layers: model\.layers\.0"):
        depthmix.attach(base, CONFIG, peft_config, late_layers_only=True)
    assert shape_of(base) == before


def test_a_whole_late_layer_is_saved_and_mixed(base: LlamaForCausalLM, tmp_path: Path):
    model = depthmix.attach(copy.deepcopy(base), CONFIG, lora(modules_to_save=["layers.3"]))
    copied = model.get_base_model().model.layers[3].modules_to_save["default"]
    perturb(model.get_base_model().depthmix.modules_to_save["default"])
    with torch.no_grad():
        copied.mlp.down_proj.weight.mul_(1.5)
    expected = logits(model)
    assert not torch.allclose(expected, logits(base))
    with depthmix.routing(model) as record:
        logits(model)
    assert record.gates[0].shape == (2, 9, 2)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert copied.mlp.down_proj.weight.grad.abs().max() > 0
    model.save_pretrained(tmp_path)
    loaded = depthmix.load(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(loaded), expected)


def test_adapters_of_transformers_are_refused(base: LlamaForCausalLM):
    base.add_adapter(lora())
    with pytest.raises(DepthmixError, match="get_peft_model"):
        depthmix.attach(base, CONFIG)


def test_adapters_of_transformers_after_attach_are_refused(base: LlamaForCausalLM):
    depthmix.attach(base, CONFIG)
    base.add_adapter(lora())
    with pytest.raises(TrainingError, match="get_peft_model"):
        base.train()(input_ids=IDS, labels=IDS)


def test_second_adapter_without_mode_is_refused_in_training(base: LlamaForCausalLM):
    model = depthmix.attach(base, CONFIG, lora())
    model.add_adapter("b", lora())
    model.set_adapter("b")
    with pytest.raises(TrainingError, match="the active adapter has no MoDE"):
        model.train()(input_ids=IDS, labels=IDS)


def test_second_adapter_with_mode(base: LlamaForCausalLM):
    model = depthmix.attach(base, CONFIG, lora())
    model.add_adapter("b", lora(modules_to_save=["depthmix"]))
    model.set_adapter("b")
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert model.get_base_model().depthmix.modules_to_save["b"].router.weight.grad is not None


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # which tells of depthmix.load
def test_hot_swap_is_refused(base: LlamaForCausalLM, tmp_path: Path):
    for name in ("a", "b"):
        depthmix.attach(copy.deepcopy(base), CONFIG, lora()).save_pretrained(tmp_path / name)
    model = depthmix.load(base, tmp_path / "a")
    with pytest.raises(DepthmixError, match="load_adapter"):
        hotswap_adapter(model, str(tmp_path / "b"), "default", torch_device="cpu")


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_model_without_its_wrapper_keeps_mode(base: LlamaForCausalLM, leave: str):
    model = depthmix.attach(copy.deepcopy(base), CONFIG, lora())
    perturb(model.get_base_model().depthmix.modules_to_save["default"])
    expected = logits(model)  # LoRA itself is nothing yet
    bare = getattr(model, leave)()
    torch.testing.assert_close(logits(bare), expected)
    with depthmix.routing(bare) as record:
        logits(bare)
    assert len(record.gates) == 1


def test_load_onto_a_peft_model_is_refused(base: LlamaForCausalLM, tmp_path: Path):
    depthmix.attach(copy.deepcopy(base), CONFIG, lora()).save_pretrained(tmp_path)
    wrapped = get_peft_model(base, lora())
    before = shape_of(base)
    with pytest.raises(DepthmixError, match="PeftModel"):
        depthmix.load(wrapped, tmp_path)
    assert shape_of(base) == before


@pytest.mark.parametrize("with_lora", [True, False])
def test_failed_load_leaves_the_base(base: LlamaForCausalLM, tmp_path: Path, with_lora: bool):
    model = depthmix.attach(copy.deepcopy(base), CONFIG, lora() if with_lora else None)
    model.save_pretrained(tmp_path)
    other = tiny_model("llama", num_hidden_layers=3)
    before = shape_of(other)
    with pytest.raises(DepthmixError):
        depthmix.load(other, tmp_path)
    assert shape_of(other) == before


def test_describing_configuration_is_copied_with_its_own_values(base: LlamaForCausalLM):
    model = depthmix.attach(base, CONFIG, lora())
    for twin in (copy.copy(model.peft_config["default"]), copy.deepcopy(model.peft_config)):
        config = twin["default"] if isinstance(twin, dict) else twin
        config.r = 99
        assert config.to_dict()["r"] == 99


@pytest.mark.parametrize(
    ("tuned", "layers"),
    [
        (1, {3}),
        (3, {1, 2, 3}),
        (0.5, {2, 3}),
        ("half", {2, 3}),
        ("all", {0, 1, 2, 3}),
        (0.01, {3}),
        ("2", {2, 3}),
        ("0.25", {3}),
    ],
)
@pytest.mark.parametrize("k", [1, 2])
def test_tuned_layers_are_apart_from_k(
    base: LlamaForCausalLM, k: int, tuned: Any, layers: set[int]
):
    mode = MoDEConfig(k=k, **PLAIN)
    model = depthmix.attach(base, mode, lora(), tuned_layers=tuned)
    assert trained_layers(model) == layers
    with_graph: list[bool] = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_hook(lambda _m, _a, out: with_graph.append(out.requires_grad))
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    assert with_graph == [i >= min(layers) for i in range(4)]


@pytest.mark.parametrize("tuned", [0, 5, -1, 0.0, 1.5, True, "most", math.nan])
def test_senseless_tuned_layers_are_refused(base: LlamaForCausalLM, tuned: Any):
    before = shape_of(base)
    with pytest.raises(ConfigError, match="a number from 1 to 4, a share"):
        depthmix.attach(base, CONFIG, lora(), tuned_layers=tuned)
    assert shape_of(base) == before


def test_two_ways_to_say_how_deep_are_refused(base: LlamaForCausalLM):
    with pytest.raises(ConfigError, match="give one of them"):
        depthmix.attach(base, CONFIG, lora(), late_layers_only=True, tuned_layers=3)
    with pytest.raises(ConfigError, match="needs a peft_config"):
        depthmix.attach(base, CONFIG, tuned_layers=3)


def test_one_layer_saves_what_peft_saves(base: LlamaForCausalLM, tmp_path: Path):
    """With k = 1 the loss is the fused one, and nothing else is different."""
    model = depthmix.attach(copy.deepcopy(base), MoDEConfig(k=1), lora())
    model.save_pretrained(tmp_path)
    plain = get_peft_model(copy.deepcopy(base), lora())
    assert "depthmix" not in (tmp_path / "adapter_config.json").read_text()
    assert get_peft_model_state_dict(model).keys() == get_peft_model_state_dict(plain).keys()
    assert not any("depthmix" in name for name in model.state_dict())
