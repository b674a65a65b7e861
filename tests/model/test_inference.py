"""An attached model at inference: the base model's equal when it must be, in every way of use."""

import contextlib
import copy
import pickle

import jaxtyping
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import depthmix
import reference
from depthmix import MoDEConfig
from depthmix.errors import DepthmixError
from depthmix.model.runtime import runtime_of
from models import (
    ANATOMIES,
    LAYERS,
    PLAIN,
    TYPES,
    Anatomy,
    attached,
    choose_last_layer,
    perturb,
    tiny_model,
    token_ids,
)

CONFIGS = [
    {"adaptation": "none"},
    {"adaptation": "low_rank"},
    {"adaptation": "affine"},
    {"router_input": "first"},
    {"router_input": "all"},
    {"router_top_k": 1},
    {"router_top_k": 2},
    {"router_prior": 0.9},
    {"k": 2},
    {"k": 4},
]
DTYPES = [torch.float32, torch.bfloat16]


def logits(model, ids=None, **inputs):
    with torch.no_grad():
        return model(token_ids() if ids is None else ids, **inputs).logits


# --- equal to the base model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", TYPES)
def test_one_hot_router_is_the_base_model_bit_for_bit(model_type, dtype):
    base = tiny_model(model_type).to(dtype)
    model = attached(base, perturbed=False)
    assert not torch.equal(logits(model), logits(base))
    choose_last_layer(model.depthmix)
    assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_one_hot_router_of_any_configuration(model_type, config, dtype):
    base = tiny_model(model_type).to(dtype)
    model = attached(base, perturbed=False, **config)
    choose_last_layer(model.depthmix)
    assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", TYPES)
def test_one_layer_is_the_base_model(model_type, dtype):
    base = tiny_model(model_type).to(dtype)
    model = attached(base, k=1)
    inputs = {"input_ids": token_ids(), "labels": token_ids()}
    assert torch.equal(logits(model), logits(base))
    assert torch.equal(model(**inputs).loss, base(**inputs).loss)
    assert list(model.depthmix.parameters()) == []


# --- equal to the reference


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_equal_the_reference(model_type):
    base = tiny_model(model_type)
    model = attached(base)
    with torch.no_grad():
        expected = reference.logits(
            base, ANATOMIES[model_type], model.depthmix, input_ids=token_ids()
        )
    assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model), logits(base), atol=0.1)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
def test_logits_of_any_configuration_equal_the_reference(config, dtype, tolerance):
    base = tiny_model("gemma2").to(dtype)
    model = attached(base, **config)
    with torch.no_grad():
        expected = reference.logits(
            base, ANATOMIES["gemma2"], model.depthmix, input_ids=token_ids()
        )
    assert (logits(model) - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("model_type", TYPES)
def test_last_hidden_state_is_the_mixture(model_type):
    base = tiny_model(model_type)
    model, anatomy = attached(base), ANATOMIES[model_type]
    with torch.no_grad():
        normed = reference.normed_states(base, anatomy, 3, input_ids=token_ids())
        mixed = model.depthmix(normed)[0]
        output = model(token_ids(), output_hidden_states=True)
        below = model.base_model(token_ids()).last_hidden_state
    assert_close(output.hidden_states[-1], mixed)
    assert_close(below, mixed)
    assert_close(anatomy.transform(model.get_output_embeddings()(below)), output.logits)
    states = base(token_ids(), output_hidden_states=True).hidden_states
    assert len(output.hidden_states) == len(states)
    assert all(map(torch.equal, output.hidden_states[:-1], states[:-1]))


def test_logits_to_keep():
    model = attached(tiny_model("llama"))
    assert_close(logits(model, logits_to_keep=2), logits(model)[:, -2:])


# --- generation


def generate(model, ids, **options):
    mask = (ids != 0).long()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | options
    return model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **options
    )


def assert_same_generation(one, other):
    assert torch.equal(one.sequences, other.sequences)
    assert_close(torch.stack(one.logits), torch.stack(other.logits), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_cache_changes_nothing(model_type):
    base = tiny_model(model_type)
    model = attached(base)
    cached, plain = (generate(model, token_ids(), use_cache=cache) for cache in (True, False))
    assert_same_generation(cached, plain)
    assert torch.equal(plain.sequences[:, 9:], logits(model, plain.sequences).argmax(-1)[:, 8:-1])
    assert not torch.equal(cached.sequences, generate(base, token_ids()).sequences)


@pytest.mark.parametrize("model_type", TYPES)
def test_left_padded_batch_gives_what_single_rows_give(model_type):
    model = attached(tiny_model(model_type))
    rows = [token_ids()[:1, :4], token_ids()[1:], token_ids()[:1, 3:]]
    batch = torch.cat([nn.functional.pad(row, (9 - row.shape[1], 0)) for row in rows])
    together = generate(model, batch)
    for i, row in enumerate(rows):
        alone = generate(model, row)
        assert torch.equal(together.sequences[i, 9:], alone.sequences[0, row.shape[1] :])
        assert_close(
            torch.stack(together.logits)[:, i],
            torch.stack(alone.logits)[:, 0],
            rtol=1e-3,
            atol=1e-4,
        )


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_beam_search(model_type):
    model = attached(tiny_model(model_type))
    cached, plain = (
        generate(model, token_ids(), num_beams=3, use_cache=cache, output_scores=True)
        for cache in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    assert_close(cached.sequences_scores, plain.sequences_scores, rtol=1e-4, atol=1e-5)
    mean_log_p = logits(model, plain.sequences).log_softmax(-1)[:, 8:-1]
    chosen = mean_log_p.gather(-1, plain.sequences[:, 9:, None]).squeeze(-1).mean(-1)
    assert_close(plain.sequences_scores, chosen, rtol=1e-4, atol=1e-5)


def test_early_exit_of_an_assistant_gives_the_same_tokens():
    """The draft runs fewer layers through the final norm, where nothing can be mixed."""
    model = attached(tiny_model("llama"))
    ids = token_ids(1)
    expected = generate(model, ids).sequences
    drafted = generate(model, ids, assistant_early_exit=2).sequences
    assert torch.equal(drafted, expected)
    assert_close(logits(model, expected), logits(model, drafted))


# --- ways to run and to keep a model


@pytest.fixture
def unchecked(monkeypatch):
    """Without the checks of shapes, which are this test suite's own and do not compile."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("model_type", "config"),
    [("llama", {}), ("gemma2", {"router_top_k": 2, "adaptation": "low_rank"}), ("gpt2", {"k": 1})],
    ids=str,
)
def test_compiled_model_is_one_graph_and_equal(model_type, config):
    model = attached(tiny_model(model_type), **config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for shift in range(3):
        ids = token_ids() + shift
        assert_close(logits(compiled, ids), logits(model, ids))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of what it does itself
def test_compiled_training_gives_the_same_gradients():
    model = attached(tiny_model("llama")).train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager")
    loss, loss_too = (m(token_ids(), labels=token_ids()).loss for m in (model, compiled))
    assert_close(loss_too, loss)
    loss.backward()
    loss_too.backward()
    for name, parameter in model.named_parameters():
        assert_close(twin.get_parameter(name).grad, parameter.grad)


@pytest.mark.parametrize(
    "twin_of",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_copies_work_and_are_independent(twin_of):
    model = attached(tiny_model("llama"))
    expected = logits(model)
    twin = twin_of(model)
    assert torch.equal(logits(twin), expected)
    perturb(twin.depthmix)
    assert not torch.equal(logits(twin), expected)
    assert torch.equal(logits(model), expected)
    depthmix.detach(model)
    assert not torch.equal(logits(model), expected)
    with depthmix.routing(twin) as record:
        perturb(twin.depthmix)
        logits(twin)
    assert record.gates[0].shape == (2, 9, 3)
    twin.train()(token_ids(), labels=token_ids()).loss.backward()
    assert twin.depthmix.router.weight.grad.any()
    assert all(p.grad is None for p in model.parameters())


def test_copy_of_an_untouched_model_takes_nothing_along():
    base = tiny_model("llama")
    attached(base)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    with pytest.raises(DepthmixError, match="no MoDE is attached to this LlamaForCausalLM"):
        runtime_of(base)


def test_attaching_twice_is_refused():
    model = attached(tiny_model("llama"))
    expected = logits(model)
    with pytest.raises(DepthmixError, match="attached to this model already; detach it first"):
        depthmix.attach(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("model_type", TYPES)
def test_detach_gives_the_base_model_back(model_type):
    base = tiny_model(model_type)
    model = attached(base)
    assert {k for k in model.state_dict() if "depthmix" not in k} == base.state_dict().keys()
    assert depthmix.detach(model) is model
    assert torch.equal(logits(model), logits(base))
    state = model.state_dict()
    assert state.keys() == base.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    ids = token_ids()
    assert torch.equal(model.train()(ids, labels=ids).loss, base.train()(ids, labels=ids).loss)
    with pytest.raises(DepthmixError, match="no MoDE is attached"):
        depthmix.detach(model)


def test_detach_leaves_no_attribute_of_mode():
    model, base = attached(tiny_model("llama")), tiny_model("llama")
    tags = copy.copy(model.model_tags)
    depthmix.detach(model)
    assert vars(model).keys() == vars(base).keys()
    assert "depthmix" in tags
    assert "depthmix" not in (model.model_tags or [])


def test_attach_again_after_detach():
    model = attached(tiny_model("llama"), k=2)
    depthmix.attach(depthmix.detach(model), MoDEConfig(k=4))
    assert runtime_of(model).anatomy.layer_indices == (0, 1, 2, 3)
    assert logits(model).isfinite().all()


def test_attach_uses_the_default_configuration_and_returns_the_model():
    model = tiny_model("llama")
    assert depthmix.attach(model) is model
    assert model.depthmix.config == MoDEConfig()


# --- routing


def test_routing_records_the_gates_of_every_forward():
    base = tiny_model("llama")
    model = attached(base)
    with depthmix.routing(model) as record:
        logits(model)
        logits(model, token_ids(1, 4))
    logits(model)
    assert record.layers == (1, 2, 3)
    assert [gate.shape for gate in record.gates] == [(2, 9, 3), (1, 4, 3)]
    normed = reference.normed_states(base, ANATOMIES["llama"], 3, input_ids=token_ids())
    assert_close(record.gates[0], reference.gate(model.depthmix, normed).detach())
    for gate in record.gates:
        assert_close(gate.sum(-1), torch.ones(gate.shape[:2]))
        assert not gate.requires_grad
    gates = torch.cat([gate.flatten(0, 1) for gate in record.gates])
    assert len(gates) == 22
    assert_close(record.mean(), gates.mean(0))


def test_routing_of_a_generation():
    model = attached(tiny_model("llama"))
    with depthmix.routing(model) as record:
        generate(model, token_ids())
    assert [gate.shape[1] for gate in record.gates] == [9, 1, 1, 1, 1, 1]


def test_routing_blocks_nest_and_end_on_errors():
    model = attached(tiny_model("llama"))
    with contextlib.suppress(ZeroDivisionError), depthmix.routing(model) as outer:
        with depthmix.routing(model) as inner:
            pass
        logits(model)
        raise ZeroDivisionError
    logits(model)
    assert (len(outer.gates), len(inner.gates)) == (1, 0)


def test_routing_needs_mode():
    with (
        pytest.raises(DepthmixError, match="no MoDE is attached"),
        depthmix.routing(tiny_model("llama")),
    ):
        pass


# --- the pretrained model


@pytest.mark.real
def test_pretrained_model(real_model_folder):
    base = AutoModelForCausalLM.from_pretrained(real_model_folder)
    tokenizer = AutoTokenizer.from_pretrained(real_model_folder)
    inputs = tokenizer("The capital of France is Paris, and that of Italy is", return_tensors="pt")
    inputs = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    with torch.no_grad():
        expected = base(**inputs).logits
        model = depthmix.attach(base, MoDEConfig(**PLAIN))
        choose_last_layer(model.depthmix)
        assert torch.equal(model(**inputs).logits, expected)
        perturb(model.depthmix)
        model.train()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        mixture = model.depthmix
        depthmix.detach(model)
        anatomy = Anatomy(None, {})
        total = reference.objective(model, anatomy, mixture, inputs["input_ids"], **inputs)
    assert tokenizer.decode(expected[0, -1].argmax()).strip() == "Rome"
    assert_close(loss, total / (inputs["input_ids"].numel() - 1), rtol=1e-5, atol=0)
    assert len(base.model.layers) > LAYERS
