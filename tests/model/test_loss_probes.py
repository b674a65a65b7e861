"""What is found out about a model's own loss, and that MoDE's is the same."""

import copy
import warnings

import pytest
import torch
import transformers as hf
from torch import nn

import depthmix
from depthmix.config import MoDEConfig
from depthmix.errors import DiscoveryError, TrainingError
from depthmix.model.discovery import discover
from depthmix.model.loss_probes import shifts_labels
from models import COMMON, GROUPED, VOCABULARY, choose_last_layer, randomise, tiny_model, token_ids
from task_models import MASKED, build

IDS = token_ids()
ALONE = MoDEConfig(k=2, adaptation="none", distill_weight=0.0, router_prior=None)
EXPERTS = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
SIDES = {
    **{"vocab_size": VOCABULARY, "d_model": 32, "dropout": 0.0, "decoder_start_token_id": 2},
    **{f"{side}_layers": 3 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    **{f"{side}_layerdrop": 0.0 for side in ("encoder", "decoder")},
    **{"attention_dropout": 0.0},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2},
}
HYBRID = {
    **(COMMON | {"num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 64}),
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [1, 3]},
    **{"mamba_d_head": 16, "mamba_n_heads": 4, "mamba_n_groups": 1, "mamba_d_state": 8},
}
# Auxiliary, z and router losses, an output bias, decoder inputs made by a function of the module.
OWN_LOSSES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, {}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        EXPERTS | {"router_aux_loss_coef": 0.5},
        {"output_router_logits": True},
    ),
    "gpt-oss at its published coefficient": (
        "GptOssForCausalLM",
        "GptOssConfig",
        EXPERTS
        | {
            **{"router_aux_loss_coef": 0.9, "output_router_logits": True, "head_dim": 8},
            **{"layer_types": ["full_attention"] * 4},
        },
        {},
    ),
    "jetmoe": (
        "JetMoeForCausalLM",
        "JetMoeConfig",
        EXPERTS | {"aux_loss_coef": 0.5, "kv_channels": 8},
        {"output_router_logits": True},
    ),
    "marian": ("MarianMTModel", "MarianConfig", SIDES, {}),
    "m2m100": ("M2M100ForConditionalGeneration", "M2M100Config", SIDES, {}),
    "blenderbot": ("BlenderbotForConditionalGeneration", "BlenderbotConfig", SIDES, {}),
}


def own_loss_model(name):
    model_class, config_class, options, inputs = OWN_LOSSES[name]
    model = randomise(getattr(hf, model_class)(getattr(hf, config_class)(**options))).eval()
    if "final_logits_bias" in dict(model.named_buffers()):
        model.final_logits_bias.normal_(std=2.0)
    return model, inputs


@pytest.mark.parametrize("name", OWN_LOSSES)
def test_loss_of_one_layer_is_the_models_own_with_all_its_terms(name):
    base, inputs = own_loss_model(name)
    model = depthmix.attach(copy.deepcopy(base), ALONE)
    choose_last_layer(model.depthmix)
    labels = IDS.clone()
    labels[0, :4] = -100
    own = base(input_ids=IDS, labels=labels, **inputs).loss
    ours = model.train()(input_ids=IDS, labels=labels, **inputs).loss
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    own.backward()
    ours.backward()
    embeddings, own_embeddings = model.get_input_embeddings(), base.get_input_embeddings()
    torch.testing.assert_close(
        embeddings.weight.grad, own_embeddings.weight.grad, rtol=1e-3, atol=1e-5
    )


def test_term_that_needs_all_logits_is_refused_by_name():
    config = hf.BambaConfig(**HYBRID, z_loss_coefficient=1.0)
    base = randomise(hf.BambaForCausalLM(config))
    with pytest.raises(DiscoveryError, match=r"BambaForCausalLM: the .* and MoDE's"):
        depthmix.attach(base, ALONE)
    assert not hasattr(base, "depthmix")


def test_router_terms_that_cannot_be_kept_are_refused_when_they_are_asked_for():
    options = {
        **{"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4},
        **{"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 2},
        **{"num_sparse_decoder_layers": 2, "num_experts": 4, "decoder_start_token_id": 0},
        **{"dropout_rate": 0.0, "router_jitter_noise": 0.0},
    }
    base = randomise(
        hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**options))
    )
    model = depthmix.attach(copy.deepcopy(base), ALONE)
    choose_last_layer(model.depthmix)
    own = base.eval()(input_ids=IDS, labels=IDS, output_router_logits=False).loss
    ours = model.train()(input_ids=IDS, labels=IDS, output_router_logits=False).loss
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    if model.depthmix_runtime.anatomy.other_terms == "lost":
        with pytest.raises(TrainingError, match="output_router_logits"):
            model(input_ids=IDS, labels=IDS, output_router_logits=True)
    else:
        own = base(input_ids=IDS, labels=IDS, output_router_logits=True).loss
        ours = model(input_ids=IDS, labels=IDS, output_router_logits=True).loss
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("coefficient", [0.001, 0.02, 0.9, 10.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_router_loss_does_not_move_labels(coefficient, seed):
    torch.manual_seed(seed)
    options = EXPERTS | {"router_aux_loss_coef": coefficient, "output_router_logits": True}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**options)).eval()
    assert discover(model, ALONE).labels_shifted


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_does_not_move_labels(dtype, seed):
    torch.manual_seed(seed)
    masked = MASKED["bert"].build().to(dtype).eval()
    assert not discover(masked, ALONE).labels_shifted
    causal = tiny_model("llama").to(dtype)
    assert discover(causal, ALONE).labels_shifted


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_too_small_a_margin_raises_with_the_figures(weight):
    model = tiny_model("llama")

    def undecided(logits, labels, **_):
        moved = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        return weight * sum(
            nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
            for target in (moved, labels)
        )

    model.loss_function = undecided
    with pytest.raises(DiscoveryError, match=r"neither.*\(off by [\d.e-]+ nats.*off by [\d.e-]+"):
        shifts_labels(model, model.lm_head)


def test_loss_that_the_model_cannot_compute_is_refused():
    model = tiny_model("llama")
    model.loss_function = None
    with pytest.raises(DiscoveryError, match="LlamaForCausalLM"):
        depthmix.attach(model, ALONE)


def test_layers_dropped_at_random_are_refused_at_attach():
    with pytest.raises(DiscoveryError, match=r"layerdrop = 0\.1"):
        depthmix.attach(tiny_model("opt", layerdrop=0.1), ALONE)


def test_probing_leaves_no_trace():
    base = build(MASKED["roberta"]).train()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depthmix.detach(depthmix.attach(base, ALONE))
    assert base.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert all(p.grad is None for p in base.parameters())
