"""`depthmix plan` against real passes of tiny models: FLOPs by torch's counter, bytes by hooks."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
)

import depthmix
from depthmix.plan.methods import METHODS
from depthmix.plan.profile import Setting
from depthmix.plan.report import count
from models import GROUPED

ROWS, LENGTH = 2, 8  # short, since walks along state-space layers are counted whole
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
    "mistral": MistralConfig(**GROUPED, sliding_window=4),
    "mixtral": MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4),
    "mamba": MambaConfig(hidden_size=32, num_hidden_layers=4, vocab_size=97),
}
IDS = torch.zeros(ROWS, LENGTH, dtype=torch.long)


def lora(model_type):
    targets = ["in_proj", "x_proj", "dt_proj"] if model_type == "mamba" else "all-linear"
    return LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")


def planned(model_type, name):
    counted = count(
        CONFIGS[model_type],
        # Eager, whose products torch's own counter knows on a CPU.
        Setting(ROWS, LENGTH, dtype=torch.float32, attention="eager"),
        {name: METHODS[name]},
        k=1,
        rank=4,
        adapter=lambda _: lora(model_type),
        checkpointing=lambda _: False,
    )
    return counted.bills[name]


def real(model_type, name):
    """Return what lies below the head of a real model, with the method on it."""
    model = AutoModelForCausalLM.from_config(CONFIGS[model_type], attn_implementation="eager")
    if name == "half":
        depthmix.attach(model, depthmix.MoDEConfig(k=1), lora(model_type), tuned_layers="half")
        depthmix.detach(model)
    elif name == "lora":
        get_peft_model(model, lora(model_type))
    return model.train().base_model, model


def measured(model_type, name):
    """Return FLOPs forward and backward, and the bytes that autograd keeps."""
    trunk, model = real(model_type, name)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with FlopCounterMode(display=False) as forward, hooks:
        hidden = trunk(input_ids=IDS, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        hidden.backward(torch.ones_like(hidden))
    saved = sum(storage.nbytes() for storage in kept.values())
    return forward.get_total_flops(), backward.get_total_flops(), saved


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", ["lora", "half", "full"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mistral", "gpt2", "mamba"])
def test_a_step_is_as_measured(model_type, name):
    bill = planned(model_type, name)
    forward, backward, saved = measured(model_type, name)
    assert bill.flops.forward == forward
    assert bill.flops.backward == pytest.approx(backward, rel=0.02)
    assert bill.memory.activations == pytest.approx(saved, rel=0.1)


def test_experts_are_as_measured():
    bill = planned("mixtral", "full")
    trunk, _ = real("mixtral", "full")
    trunk.set_experts_implementation("eager")  # one product an expert, which the counter knows
    with FlopCounterMode(display=False) as forward:
        hidden = trunk(input_ids=IDS, use_cache=False).last_hidden_state
    with FlopCounterMode(display=False) as backward:
        hidden.backward(torch.ones_like(hidden))
    assert bill.flops.forward == forward.get_total_flops()
    assert bill.flops.backward == pytest.approx(backward.get_total_flops(), rel=0.02)
