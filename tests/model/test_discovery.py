"""Finding the parts of a model, and clear errors where they are not there."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    LlamaForCausalLM,
    LlamaModel,
    OpenAIGPTConfig,
)

import depthmix
import reference
from depthmix import MoDEConfig
from depthmix.errors import DiscoveryError
from depthmix.model.anatomy import Between
from depthmix.model.discovery import discover
from models import (
    ANATOMIES,
    COMMON,
    HIDDEN,
    LAYERS,
    TYPES,
    USUAL,
    VOCABULARY,
    Anatomy,
    attached,
    randomise,
    tiny_model,
    token_ids,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", TYPES)
def test_parts_are_found(model_type, dtype):
    anatomy = ANATOMIES[model_type]
    model = tiny_model(model_type).to(dtype)
    found = discover(model, MoDEConfig(k=2))
    assert found.layers_path == anatomy.layers
    assert found.norm_path == anatomy.norm
    assert model.get_submodule(found.head_path) is model.get_output_embeddings()
    assert found.layer_indices == (LAYERS - 2, LAYERS - 1)
    assert found.layer_paths == tuple(f"{anatomy.layers}.{i}" for i in (2, 3))
    assert (found.head_scale, found.hidden_size, found.vocabulary) == (1.0, HIDDEN, VOCABULARY)
    raw = torch.linspace(-30, 30, 50)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    torch.testing.assert_close(
        found.logit_transform(raw), anatomy.transform(raw), rtol=tolerance, atol=1e-6
    )


@pytest.mark.parametrize("cap", [1.0, 15.0, 30.0, 50.0])
def test_soft_caps_of_any_size_are_found(cap):
    model = tiny_model("gemma2", final_logit_softcapping=cap)
    transform = discover(model, MoDEConfig()).logit_transform
    assert transform.cap == pytest.approx(cap, rel=1e-4)
    assert transform.scale == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("scaling", [0.05, 3.0, 13.0])
def test_scales_of_any_size_are_found(scaling):
    model = tiny_model("granite", logits_scaling=scaling)
    transform = discover(model, MoDEConfig()).logit_transform
    assert transform.cap is None
    assert transform.scale == pytest.approx(1 / scaling, rel=1e-4)


def test_scale_and_cap_together_are_found():
    class Both(LlamaForCausalLM):
        def forward(self, *args, labels=None, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 8 * torch.tanh(output.logits * 0.3 / 8)
            if labels is not None:
                output.loss = self.loss_function(output.logits, labels, self.config.vocab_size)
            return output

    transform = discover(Both(tiny_model("llama").config), MoDEConfig()).logit_transform
    assert transform.cap == pytest.approx(8, rel=1e-3)
    assert transform.scale == pytest.approx(0.3, rel=1e-2)


@pytest.mark.parametrize("k", range(1, LAYERS + 1))
def test_late_layers_are_the_last_ones(k):
    found = discover(tiny_model("llama"), MoDEConfig(k=k))
    assert found.layer_indices == tuple(range(LAYERS - k, LAYERS))


def test_search_leaves_the_model_as_it_was():
    model = tiny_model("llama")
    before = model(token_ids()).logits
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    discover(model, MoDEConfig())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(model.eval()(token_ids()).logits, before)


def test_too_many_layers_are_refused():
    model = tiny_model("llama")
    with pytest.raises(
        DiscoveryError, match=r"k = 5.*LlamaForCausalLM has 4 layers.*model\.layers"
    ):
        depthmix.attach(model, MoDEConfig(k=5))
    assert "depthmix" not in dict(model.named_children())


def test_explicit_paths_are_those_found():
    model = tiny_model("llama")
    config = MoDEConfig(layers_path="model.layers", norm_path="model.norm")
    assert discover(model, config) == discover(model, MoDEConfig())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_path": "model.layers.3.input_layernorm"}, r"norm_path 'model\.layers\.3.*is not"),
        ({"norm_path": "model.nrom"}, r"norm_path 'model\.nrom' is not"),
        ({"layers_path": "model.layer"}, r"layers_path 'model\.layer'; lists of modules: none"),
        ({"layers_path": "model.norm"}, r"layers_path 'model\.norm'"),
    ],
    ids=str,
)
def test_wrong_paths_are_refused(config, message):
    with pytest.raises(DiscoveryError, match=message):
        discover(tiny_model("llama"), MoDEConfig(**config))


class TwoLists(LlamaForCausalLM):
    """A longer list of modules, which are no layers, gives states of the same shape."""

    def __init__(self, config):
        super().__init__(config)
        self.probes = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(6))
        self.model.layers[0].register_forward_hook(self.look)

    def look(self, _layer, _args, state):
        for probe in self.probes:
            probe(state)


def test_paths_settle_what_is_unclear():
    model = TwoLists(tiny_model("llama").config)
    with pytest.raises(DiscoveryError, match=r"last layer, probes\.5"):
        discover(model, MoDEConfig())
    found = discover(model, MoDEConfig(layers_path="model.layers"))
    assert (found.layers_path, found.norm_path) == ("model.layers", "model.norm")


class Backwards(nn.ModuleList):
    """Runs in the other direction than it is listed."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return list(found)[::-1] if isinstance(index, slice) else found


def test_layers_out_of_order_are_refused():
    model = tiny_model("llama")
    model.model.layers = Backwards(model.model.layers)
    with pytest.raises(DiscoveryError, match="do not run in the order"):
        discover(model, MoDEConfig())


def test_shared_layers_are_refused():
    model = tiny_model("llama")
    model.model.layers = nn.ModuleList([model.model.layers[0]] * LAYERS)
    with pytest.raises(DiscoveryError, match="more than once a forward"):
        discover(model, MoDEConfig())


class OddHead(LlamaForCausalLM):
    """Logits that are no scale and no soft cap of the head's output."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.relu()
        return output


def test_odd_logits_are_refused():
    with pytest.raises(DiscoveryError, match="neither a scale nor a soft cap"):
        discover(OddHead(tiny_model("llama").config), MoDEConfig())


def test_head_that_is_not_called_is_refused(monkeypatch):
    model = tiny_model("llama")
    spare = nn.Linear(HIDDEN, VOCABULARY)
    monkeypatch.setattr(LlamaForCausalLM, "get_output_embeddings", lambda _self: spare)
    with pytest.raises(DiscoveryError, match="did not call its LM head"):
        discover(model, MoDEConfig())


def test_model_without_a_head_is_refused():
    with pytest.raises(DiscoveryError, match="LlamaModel has no LM head"):
        discover(LlamaModel(tiny_model("llama").config), MoDEConfig())


def without_final_norm(name):
    if name == "bart":
        config = BartConfig(
            **COMMON,
            d_model=HIDDEN,
            decoder_layers=4,
            decoder_ffn_dim=64,
            decoder_attention_heads=4,
        )
    else:
        config = OpenAIGPTConfig(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=4, n_head=4)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["bart", "openai-gpt"])
def test_models_without_a_final_norm_mix_the_states_as_they_are(name):
    found = discover(without_final_norm(name), MoDEConfig(k=2))
    assert found.between is Between.NOTHING
    assert found.norm_path is None


def test_unclear_structure_is_refused_and_left_as_it_was():
    model = tiny_model("llama")
    between = model.model.register_forward_hook(
        lambda _m, _a, out: type(out)(last_hidden_state=out.last_hidden_state.sin().cumsum(0))
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DiscoveryError, match=r"last layer, \S+ \(1, 5, 32\).*every row alike"):
        depthmix.attach(model, MoDEConfig(k=2))
    between.remove()
    assert model.state_dict().keys() == before.keys()
    assert not any(module._forward_hooks for module in model.modules())


def test_function_between_norm_and_head_takes_stacked_states():
    """No module leads from the last layer to the head; whatever does treats every row alike."""
    base = tiny_model("llama")
    base.model.register_forward_hook(
        lambda _m, _a, out: type(out)(last_hidden_state=out.last_hidden_state.sin())
    )
    model = attached(base, k=2)
    assert model.depthmix_runtime.anatomy.between is Between.MODULES
    with torch.no_grad():
        given = reference.head_inputs(base, "model.layers", "lm_head", 2, input_ids=token_ids())
        raw = reference.raw_logits(base, reference.adapted(model.depthmix, given))
        expected = (reference.gate(model.depthmix, given).unsqueeze(-1) * raw).sum(-2)
        torch.testing.assert_close(model(token_ids()).logits, expected, rtol=1e-4, atol=1e-4)


def test_transform_before_the_head_is_taken_as_the_final_norm():
    """BERT: dense, activation and norm stand between the last layer and the linear head."""
    base = randomise(BertLMHeadModel(BertConfig(**USUAL, is_decoder=True))).eval()
    anatomy = Anatomy(BertConfig, {}, "bert.encoder.layer", "cls.predictions.transform")
    found = discover(base, MoDEConfig())
    assert (found.layers_path, found.norm_path) == (anatomy.layers, anatomy.norm)
    model = attached(base)
    inputs = {"input_ids": token_ids()}
    expected = reference.logits(base, anatomy, model.depthmix, **inputs)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
