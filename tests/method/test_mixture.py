"""`DepthMixture`: mixing before the head, its start, its gate and its dtypes."""

import copy
import pickle

import pytest
import torch
from jaxtyping import TypeCheckError
from torch.testing import assert_close

import reference
from depthmix import MoDEConfig
from depthmix.method.mixture import DepthMixture, read_spec
from models import choose_last_layer, perturb

D, V = 16, 29
CONFIGS = [
    {"adaptation": "norm"},
    {"adaptation": "none"},
    {"adaptation": "affine"},
    {"adaptation": "low_rank", "adaptation_rank": 3},
    {"adaptation": "low_rank", "adaptation_rank": 99},
    {"router_input": "first"},
    {"router_input": "all"},
    {"router_top_k": 1},
    {"router_top_k": 2, "router_input": "all"},
    {"router_prior": None},
    {"router_prior": 0.3, "adaptation": "affine"},
    {"k": 2},
    {"k": 5, "router_top_k": 4},
]


def make(perturbed=True, **config):
    config = MoDEConfig(**config)
    mixture = DepthMixture(config, D, {"config": config.to_dict()})
    if perturbed:
        perturb(mixture)
    return mixture


def normed_states(mixture, *batch, dtype=torch.float64):
    return torch.randn(*batch, mixture.config.k, D, dtype=dtype)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_states_and_gate_equal_the_reference(config):
    mixture = make(**config)
    normed = normed_states(mixture, 2, 7)
    states, gate = mixture.adapt(normed)
    assert_close(states, reference.adapted(mixture, normed))
    assert_close(gate, reference.gate(mixture, normed))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 5e-3)]
)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_one_head_on_the_mixture_is_the_gated_sum_of_k_heads(config, dtype, tolerance):
    mixture = make(**config)
    normed = normed_states(mixture, 2, 7, dtype=dtype)
    head = torch.randn(V, D, dtype=torch.float64)
    mixed, gate = mixture(normed)
    assert (mixed.dtype, mixed.shape, gate.shape) == (dtype, (2, 7, D), (2, 7, mixture.config.k))
    states, _ = mixture.adapt(normed)
    ensemble = (gate.double().unsqueeze(-1) * (states.double() @ head.T)).sum(-2)
    assert (mixed.double() @ head.T - ensemble).norm() <= tolerance * ensemble.norm()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_hot_gate_returns_the_last_layer_bit_for_bit(config, dtype):
    mixture = make(perturbed=False, **config)
    choose_last_layer(mixture)
    normed = normed_states(mixture, 3, dtype=dtype) * 100
    assert torch.equal(mixture(normed)[0], normed[..., -1, :])


def test_start_is_seeded_and_leaves_the_tuning_method_its_random_numbers():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = DepthMixture(MoDEConfig(adaptation="low_rank"), 8, {})
    assert torch.equal(torch.rand(2), expected)
    torch.manual_seed(3)
    again = DepthMixture(MoDEConfig(adaptation="low_rank"), 8, {})
    assert torch.equal(first.norm.down, again.norm.down)
    torch.manual_seed(4)
    other = DepthMixture(MoDEConfig(adaptation="low_rank"), 8, {})
    assert not torch.equal(first.norm.down, other.norm.down)


@pytest.mark.parametrize("adaptation", ["norm", "none", "affine", "low_rank"])
def test_adaptation_starts_as_the_identity(adaptation):
    mixture = make(perturbed=False, adaptation=adaptation)
    normed = normed_states(mixture, 5, dtype=torch.float32)
    assert torch.equal(mixture.adapt(normed)[0], normed)


@pytest.mark.parametrize("router_input", ["last", "first", "all"])
@pytest.mark.parametrize(("k", "prior"), [(3, None), (3, 0.9), (2, 0.01), (5, 0.2)])
def test_gate_starts_as_the_prior_on_every_token(k, prior, router_input):
    mixture = make(perturbed=False, k=k, router_prior=prior, router_input=router_input)
    gate = mixture(normed_states(mixture, 4))[1]
    last = 1 / k if prior is None else prior
    expected = torch.tensor([(1 - last) / (k - 1)] * (k - 1) + [last], dtype=gate.dtype)
    assert_close(gate, expected.expand(4, k), rtol=0, atol=1e-6)


def test_gate_starts_exactly_uniform_without_prior():
    mixture = make(perturbed=False, k=4, router_prior=None)
    gate = mixture(normed_states(mixture, 4))[1]
    assert torch.equal(gate, torch.full_like(gate, 0.25))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_top_k_keeps_so_many_layers_and_their_proportions(top_k):
    sparse = make(router_top_k=top_k)
    dense = make()
    dense.load_state_dict(sparse.state_dict() | {"spec": dense.spec})
    normed = normed_states(sparse, 50)
    gate, whole = sparse(normed)[1], dense(normed)[1]
    kept = gate > 0
    assert (kept.sum(-1) == top_k).all()
    assert (
        whole.masked_fill(~kept, torch.inf).amin(-1) >= whole.masked_fill(kept, 0).amax(-1)
    ).all()
    assert_close(gate, (whole * kept) / (whole * kept).sum(-1, keepdim=True))


def test_router_ignores_the_length_of_its_input():
    mixture = make()
    normed = normed_states(mixture, 6)
    assert_close(mixture(normed)[1], mixture(1000 * normed)[1])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_parameter_gets_a_gradient(config):
    mixture = make(**config)
    normed = normed_states(mixture, 8)
    mixed, _ = mixture(normed)
    mixed.square().sum().backward()
    for name, parameter in mixture.named_parameters():
        assert parameter.grad is not None, name
        if mixture.config.router_top_k != 1 or "router" not in name:
            assert parameter.grad.any(), name


def test_zero_is_the_start_so_that_weight_decay_leads_back_to_it():
    mixture = make(router_prior=0.7, adaptation="affine")
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter.zero_()
    normed = normed_states(mixture, 5)
    states, gate = mixture.adapt(normed)
    assert torch.equal(states, normed)
    assert_close(gate[:, -1], torch.full_like(gate[:, -1], 0.7), rtol=0, atol=1e-6)


def test_one_layer_has_no_parameters_and_changes_nothing():
    mixture = make(k=1)
    normed = normed_states(mixture, 5, dtype=torch.bfloat16)
    mixed, gate = mixture(normed)
    assert list(mixture.parameters()) == []
    assert torch.equal(mixed, normed[:, 0])
    assert torch.equal(gate, torch.ones(5, 1))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_autocast_does_not_touch_router_and_norms(config):
    mixture = make(**config)
    normed = normed_states(mixture, 9, dtype=torch.float32)
    mixed, gate = mixture(normed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed_too, gate_too = mixture(normed)
    assert torch.equal(mixed, mixed_too)
    assert torch.equal(gate, gate_too)


@pytest.mark.parametrize(
    "change", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.double()]
)
def test_parameters_stay_in_fp32_whatever_the_model_becomes(change):
    mixture = make(adaptation="affine")
    before = {name: p.clone() for name, p in mixture.state_dict().items()}
    after = change(mixture).state_dict()
    assert {p.dtype for p in mixture.parameters()} == {torch.float32}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert mixture.to("meta").router.weight.device.type == "meta"


def test_bf16_states_are_mixed_in_fp32():
    mixture = make()
    normed = normed_states(mixture, 20, dtype=torch.bfloat16)
    states, gate = mixture.adapt(normed)
    assert states.dtype == gate.dtype == torch.float32
    assert_close(states, reference.adapted(mixture, normed.double()).float())


@pytest.mark.parametrize("batch", [(), (1,), (0,), (2, 3), (2, 3, 4)], ids=str)
def test_any_number_of_batch_dimensions(batch):
    mixture = make()
    normed = normed_states(mixture, *batch)
    mixed, gate = mixture(normed)
    assert mixed.shape == (*batch, D)
    assert_close(gate.sum(-1), torch.ones_like(gate[..., 0]))


def test_shapes_are_checked_at_run_time():
    """The import hook of conftest.py bites: in calls, in dataclasses, between arguments."""
    from depthmix.method.head import LogitGradients
    from depthmix.method.mixture import mix

    with pytest.raises(TypeCheckError):
        mix(torch.zeros(4, 3, D), torch.zeros(4, 2))
    with pytest.raises(TypeCheckError):
        mix(torch.zeros(4, 3, D).long(), torch.zeros(4, 3))
    with pytest.raises(TypeCheckError):
        LogitGradients(torch.zeros(4, 3), torch.zeros(4, 2, 5))
    assert mix(torch.zeros(4, 3, D), torch.zeros(4, 3)).shape == (4, D)


def test_spec_describes_the_module_and_survives_copies():
    mixture = make(k=2, router_prior=0.3)
    for twin in (copy.deepcopy(mixture), pickle.loads(pickle.dumps(mixture))):
        assert MoDEConfig.from_dict(read_spec(twin.spec)["config"]) == mixture.config
        normed = normed_states(mixture, 3)
        assert torch.equal(twin(normed)[0], mixture(normed)[0])
        assert twin.router.weight is not mixture.router.weight
