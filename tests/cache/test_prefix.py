"""The frozen layers: where the cut is, what is refused, what the folder of a cache depends on."""

import copy

import pytest
import torch
from cached_runs import CONFIG, late, lora
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import depthmix
from depthmix.cache.depth import cached_depth
from depthmix.cache.prefix import NothingFrozenError, frozen_prefix
from depthmix.carry.adapters import mode_only_config
from depthmix.carry.depth import restricted
from depthmix.errors import ConfigError
from depthmix.model.discovery import discover
from models import tiny_model


def plain_late(base, count):
    return get_peft_model(base, restricted(lora(), discover(base, CONFIG), count))


def head_only(base):
    return get_peft_model(base, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (lambda base: late(base, k=2, tuned_layers=2), 2),
        (lambda base: late(base, k=3, tuned_layers=2), 2),
        (lambda base: late(base, k=4, tuned_layers=2), 1),
        (lambda base: late(base, k=1, tuned_layers=3), 1),
        (lambda base: late(base, k=2, tuned_layers=3), 1),
        (lambda base: plain_late(base, 1), 3),
        (head_only, 4),
        (lambda base: depthmix.attach(base, CONFIG, mode_only_config()), 3),
    ],
)
def test_the_cut_is_below_what_is_trained_and_what_the_mixture_reads(build, layers):
    model = build(tiny_model("llama"))
    assert len(frozen_prefix(model).layers) == layers


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda base: depthmix.attach(base, CONFIG, lora()), r"layers\.0.*lora_A.* is trained"),
        (lambda base: depthmix.attach(base, CONFIG), "nothing is frozen"),
        (lambda base: late(base, k=2, tuned_layers="all"), "nothing is frozen"),
        (
            lambda base: depthmix.attach(
                base, CONFIG, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
            ),
            "the prompt is trained",
        ),
    ],
)
def test_prefix_that_is_not_frozen_is_refused(build, message):
    with pytest.raises(ConfigError, match=message):
        frozen_prefix(build(tiny_model("llama")))


def test_nothing_frozen_is_an_error_of_its_own():
    with pytest.raises(NothingFrozenError):
        frozen_prefix(tiny_model("llama"))


@pytest.mark.parametrize("tied", [False, True])
def test_trained_embeddings_are_refused_and_a_head_of_its_own_is_not(tied):
    base = tiny_model("llama", tie_word_embeddings=tied)
    model = late(base)
    model.get_base_model().lm_head.weight.requires_grad_()
    if not tied:
        assert len(frozen_prefix(model).layers) == 2
        model.get_base_model().model.embed_tokens.weight.requires_grad_()
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight is trained, which lies below"):
        frozen_prefix(model)


def digest(model):
    return frozen_prefix(model).digest(torch.float32, torch.device("cpu"))


def test_the_folder_depends_on_every_frozen_number():
    base = tiny_model("llama")
    before = digest(late(base))
    names = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"]
    for name in [*names, "model.layers.1.input_layernorm.weight"]:
        other = copy.deepcopy(base)
        with torch.no_grad():
            other.get_parameter(name).flatten()[-7] += 1e-3
        assert digest(late(other)) != before
    other = copy.deepcopy(base)
    other.model.rotary_emb.inv_freq += 1e-3
    assert digest(late(other)) != before
    assert digest(late(base, k=4)) != before


def test_the_folder_does_not_depend_on_what_lies_above():
    base = tiny_model("llama")
    before = digest(late(base))
    other = copy.deepcopy(base)
    with torch.no_grad():
        for name in ("model.layers.2.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
            other.get_parameter(name).add_(1)
    assert digest(late(other)) == before
    assert digest(late(base, k=1)) == before
    assert digest(plain_late(copy.deepcopy(base), 2)) == before


def test_changed_rows_of_the_embeddings_are_another_cache(tmp_path):
    base = tiny_model("llama", vocab_size=20000)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.embed_tokens.weight[19997:].normal_()
    ids = torch.tensor([[5, 19998, 6]])
    for host in (base, other):
        model = late(host).train()
        expected = model(input_ids=ids, labels=ids).loss
        with cached_depth(model, tokens=100, folder=tmp_path) as cache:
            assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)
        assert len(cache.store) == 1


def test_a_frozen_adapter_below_the_cut_is_refused():
    model = get_peft_model(tiny_model("llama"), lora())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.3." in name and "lora" in name)
    with pytest.raises(ConfigError, match=r"layers\.0\..* carries an adapter"):
        frozen_prefix(model)
