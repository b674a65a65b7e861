"""Finding the parts of a model, and clear errors where they are not there."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    LlamaForCausalLM,
    LlamaModel,
    OpenAIGPTConfig,
)

import depthmix
import reference
from depthmix import MoDEConfig
from depthmix.discovery import discover
from depthmix.errors import DiscoveryError
from models import _USUAL, ANATOMIES, HIDDEN, LAYERS, TYPES, VOCABULARY, tiny_model, token_ids


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
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 8 * torch.tanh(output.logits * 0.3 / 8)
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


class Shuffled(LlamaForCausalLM):
    """The layers run in another order than they are listed."""

    def __init__(self, config):
        super().__init__(config)
        first, second, third, last = self.model.layers
        first.forward, last.forward = last.forward, first.forward
        order = [last, second, third, first]
        self.model.layers = nn.ModuleList(order)
        self.model.layers.__class__ = ReversedList


class ReversedList(nn.ModuleList):
    def __getitem__(self, index):
        return (
            [*self._modules.values()][::-1]
            if isinstance(index, slice)
            else super().__getitem__(index)
        )


def test_layers_out_of_order_are_refused():
    with pytest.raises(DiscoveryError, match=r"last layer, model\.layers\.3 \(1, 5, 32\) float32"):
        discover(Shuffled(tiny_model("llama").config), MoDEConfig())


class Shared(LlamaForCausalLM):
    """One layer, listed four times."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = nn.ModuleList([self.model.layers[0]] * LAYERS)


def test_shared_layers_are_refused():
    with pytest.raises(DiscoveryError, match="more than once a forward"):
        discover(Shared(tiny_model("llama").config), MoDEConfig())


class OddHead(LlamaForCausalLM):
    """Logits that are no scale and no soft cap of the head's output."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.relu()
        return output


def test_odd_logits_are_refused():
    with pytest.raises(DiscoveryError, match="neither a scale nor a soft cap"):
        discover(OddHead(tiny_model("llama").config), MoDEConfig())


class HeadUnused(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 0
        return output

    def get_output_embeddings(self):
        return self.spare

    def __init__(self, config):
        super().__init__(config)
        self.spare = nn.Linear(HIDDEN, VOCABULARY)


def test_head_that_is_not_called_is_refused():
    with pytest.raises(DiscoveryError, match="did not call its LM head"):
        discover(HeadUnused(tiny_model("llama").config), MoDEConfig())


def test_model_without_a_head_is_refused():
    with pytest.raises(DiscoveryError, match="LlamaModel has no LM head"):
        discover(LlamaModel(tiny_model("llama").config), MoDEConfig())


def foreign(name):
    sizes = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    configs = {
        # A head with a dense layer and an activation: the ensemble needs k of them.
        "bert": lambda: BertConfig(**_USUAL, is_decoder=True),
        # No final norm.
        "bart": lambda: BartConfig(
            **sizes, d_model=HIDDEN, decoder_layers=4, decoder_ffn_dim=64, decoder_attention_heads=4
        ),
        "openai-gpt": lambda: OpenAIGPTConfig(
            vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=4, n_head=4
        ),
    }
    return AutoModelForCausalLM.from_config(configs[name]()).eval()


@pytest.mark.parametrize("name", ["bert", "bart", "openai-gpt"])
def test_structures_that_mode_does_not_fit_are_refused(name):
    model = foreign(name)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DiscoveryError, match=r"last layer, \S+ \(1, 5, 32\).*no final norm"):
        depthmix.attach(model, MoDEConfig(k=2))
    assert model.state_dict().keys() == before.keys()
    assert not any(module._forward_hooks for module in model.modules())


def test_reference_and_library_agree_on_where_the_states_are():
    """The anatomies of models.py, by which the reference goes, are those of the library."""
    model = tiny_model("llama")
    normed = reference.normed_states(model, ANATOMIES["llama"], 2, input_ids=token_ids())
    last = model(token_ids(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(normed[..., -1, :], last)
