"""What cannot be replayed is found by running the first batch again, and refused."""

import copy

import pytest
import torch
from cached_runs import CONFIG, batches, late, packed_batches, parameters, train
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

import depthmix
from depthmix.cache.check import RandomState
from depthmix.cache.depth import cached_depth
from depthmix.errors import ConfigError
from models import GROUPED, randomise, tiny_model, token_ids

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]

RANDOM = "give other states for the same rows"
MORE = "reads more of its frozen layers"


def noisy_embeddings():
    """What NEFTune does, once training begins."""
    model = late(tiny_model("llama"))
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(
        lambda m, _a, out: out + torch.rand_like(out) if m.training else out
    )
    return model


def mixtral(aux):
    torch.manual_seed(0)
    sizes = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = MixtralConfig(**sizes, output_router_logits=aux, router_aux_loss_coef=0.001)
    base = randomise(AutoModelForCausalLM.from_config(config))
    tuning = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    return depthmix.attach(base, CONFIG, tuning, tuned_layers=2)


class OfBatch(nn.Module):
    """A layer that mixes the rows of a batch."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, states, *args, **kwargs):
        return self.layer(states, *args, **kwargs) + states.mean(0, keepdim=True)


def mixing_rows():
    base = tiny_model("llama")
    base.model.layers[0] = OfBatch(base.model.layers[0])
    return late(base)


def reading_the_first_layer():
    """Its late layers add what the first one gave."""
    model, kept = late(tiny_model("llama")), {}
    layers = model.get_base_model().model.layers
    layers[0].register_forward_hook(lambda _m, _a, out: kept.update(state=out))
    layers[3].register_forward_hook(lambda _m, _a, out: out + kept["state"])
    return model


CASES = [
    (lambda: late(tiny_model("llama", attention_dropout=0.1)), RANDOM),
    (lambda: late(tiny_model("opt", dropout=0.1)), RANDOM),
    (lambda: late(tiny_model("gpt2", embd_pdrop=0.1)), RANDOM),
    (noisy_embeddings, RANDOM),
    (lambda: mixtral(aux=True), MORE),
    (reading_the_first_layer, MORE),
    (mixing_rows, "change each other's states"),
]


@pytest.mark.parametrize(("build", "message"), CASES)
def test_what_cannot_be_replayed_is_refused(build, message, tmp_path):
    model = build()
    before = copy.deepcopy(parameters(model))
    with (
        pytest.raises(ConfigError, match=f"cache: .*{message}"),
        cached_depth(model, tokens=100, folder=tmp_path),
    ):
        train(model)
    assert all(torch.equal(p, before[name]) for name, p in parameters(model).items())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("build", "message"), CASES[3:6])
def test_or_trained_without_the_cache(build, message, tmp_path, caplog):
    torch.manual_seed(3)
    expected = train(build())
    torch.manual_seed(3)
    model = build()
    with cached_depth(model, tokens=100, folder=tmp_path, required=False) as cache:
        assert train(model) == pytest.approx(expected, rel=1e-6)
    (record,) = caplog.records
    assert record.message.startswith("no cache: ")
    assert message in record.message
    assert cache.hits == 0
    assert not any(tmp_path.iterdir())


def test_experts_without_an_auxiliary_loss_are_cached(tmp_path):
    expected = train(mixtral(aux=False))
    model = mixtral(aux=False)
    with cached_depth(model, tokens=100, folder=tmp_path) as cache:
        assert train(model) == pytest.approx(expected, rel=1e-5)
    assert cache.hits == 4


def test_packed_rows_that_attend_to_each_other_are_refused(tmp_path):
    """With a key-value cache, transformers does not look for them."""

    def packed():
        for batch in packed_batches():
            yield batch | {"use_cache": True}

    model = late(tiny_model("llama"))
    with (
        pytest.raises(ConfigError, match="packed rows need an attention"),
        cached_depth(model, tokens=100, folder=tmp_path),
    ):
        train(model, packed)


def test_another_form_of_batch_is_checked_anew(tmp_path):
    model = late(tiny_model("llama")).train()
    batch = next(batches())
    with cached_depth(model, tokens=100, folder=tmp_path) as cache:
        for _ in range(2):
            model(**batch)
        assert (cache.hits, cache.misses) == (1, 1)
        with pytest.raises(ConfigError, match=f"output .*hidden_states|{MORE}"):
            model(**batch, output_hidden_states=True)


def test_an_argument_that_is_trained_is_refused(tmp_path):
    model = late(tiny_model("llama")).train()
    prompt = nn.Parameter(torch.randn(2, 9, 32))
    with (
        pytest.raises(ConfigError, match="an argument of the model is trained"),
        cached_depth(model, tokens=100, folder=tmp_path),
    ):
        model(inputs_embeds=prompt, labels=token_ids())


def test_random_states_depart_and_come_back():
    model = nn.Linear(2, 2)
    state = RandomState(model)
    first = torch.rand(3)
    state.depart()
    assert not torch.equal(torch.rand(3), first)
    state.restore()
    assert torch.equal(torch.rand(3), first)
