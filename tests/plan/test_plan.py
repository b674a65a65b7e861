"""`depthmix plan`: counts are those of the real thing, no weights are loaded, 70B is quick."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

import depthmix
from depthmix.carry.adapters import mode_only_config
from depthmix.cli import main
from depthmix.config import MoDEConfig
from depthmix.plan.memory import METHODS, Batch, bill, mode_parameters
from depthmix.plan.trunk import Step, count_trunk
from models import ANATOMIES, tiny_model

STEP = Step(rows=2, length=8, k=2, rank=4, dtype=torch.float32)


def lora():
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def real(model_type, method):
    """The model as `attach` or PEFT would build it, in training mode."""
    base, config = tiny_model(model_type), MoDEConfig(k=2)
    model = {
        "full": lambda: base,
        "lora": lambda: get_peft_model(base, lora()),
        "lora+mode": lambda: depthmix.attach(base, config, lora()),
        "late-lora+mode": lambda: depthmix.attach(base, config, lora(), late_layers_only=True),
        "mode": lambda: depthmix.attach(base, config, mode_only_config()),
    }[method]()
    return model.train()


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["full", "lora", "lora+mode", "late-lora+mode", "mode"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt_neox"])
def test_trained_parameters_are_those_of_the_real_model(model_type, method):
    anatomy = ANATOMIES[model_type]
    trunk_method, with_mode = METHODS[method]
    trunk = count_trunk(anatomy.config(**anatomy.options), trunk_method, STEP)
    config = MoDEConfig(k=2) if with_mode else None
    found = bill(trunk, config, Batch(2, 8, 0.5, torch.float32, 1))
    assert found.trained == trained(real(model_type, method))
    assert found.adapter_bytes == 4 * found.trained


@pytest.mark.parametrize("method", ["lora", "late-lora"])
def test_flops_and_saved_bytes_are_those_of_a_real_pass(method):
    anatomy = ANATOMIES["llama"]
    trunk = count_trunk(anatomy.config(**anatomy.options), method, STEP)
    model = real("llama", "lora") if method == "lora" else real("llama", "late-lora+mode")
    if method == "late-lora":
        depthmix.detach(model)
    saved = {}
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(2, 8, dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        hidden = model.get_base_model().base_model(input_ids=ids, use_cache=False).last_hidden_state
    assert trunk.forward_flops == counter.get_total_flops()
    total = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert trunk.saved_bytes == pytest.approx(total, rel=0.1)
    with FlopCounterMode(display=False) as counter:
        hidden.sum().backward()
    assert trunk.backward_flops == counter.get_total_flops()


def test_late_layers_keep_fewer_activations_and_mode_alone_none():
    anatomy = ANATOMIES["llama"]
    config = anatomy.config(**anatomy.options)
    saved = {m: count_trunk(config, m, STEP).saved_bytes for m in ("lora", "late-lora", "none")}
    assert saved["none"] == 0 < saved["late-lora"] < 0.6 * saved["lora"]


def test_mode_parameters_are_those_of_the_mixture():
    model = depthmix.attach(tiny_model("llama"), MoDEConfig(k=3))
    assert mode_parameters(MoDEConfig(k=3), 32) == sum(
        p.numel() for p in model.depthmix.parameters()
    )


def test_sharding_divides_what_is_sharded():
    anatomy = ANATOMIES["llama"]
    trunk = count_trunk(anatomy.config(**anatomy.options), "full", STEP)
    one, four = (bill(trunk, None, Batch(2, 8, 0.5, torch.float32, n)) for n in (1, 4))
    assert four.optimizer == one.optimizer // 4
    assert four.activations == one.activations
    layer = trunk.parameters * 4 // trunk.layers
    assert four.weights == one.weights // 4 + layer


def test_seventy_billion_parameters_take_no_memory(tmp_path, capsys, monkeypatch):
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=8,  # 80 take half a minute on a slow core; the width is what matters
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=32000,
    ).save_pretrained(tmp_path)

    def no_weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_weights)
    flags = ["--gpus", "8", "--sharding", "fsdp", "--length", "2048", "--json"]
    assert main(["plan", str(tmp_path), *flags]) == 0
    bills = json.loads(capsys.readouterr().out)
    assert set(bills) == set(METHODS)
    assert bills["full"]["trained"] > 7e9
    assert bills["late-lora+mode"]["activations"] < bills["lora"]["activations"]


def test_table_and_errors(tiny, capsys):
    assert main(["plan", tiny, "--length", "16"]) == 0
    output = capsys.readouterr().out
    assert "late-lora+mode" in output
    assert "cached depth:" in output
    assert main(["plan", tiny, "--k", "9"]) == 2
    assert "k = 9, but the model has 4 layers" in capsys.readouterr().err
    assert main(["plan", "/nowhere"]) == 2
    assert "no configuration" in capsys.readouterr().err
