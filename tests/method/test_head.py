"""The head's two implementations, and what happens to its output, against autograd."""

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.autograd import grad
from torch.testing import assert_close

import reference
from depthmix.method import fused_loss as losses
from depthmix.method.fused_loss import ensemble_loss
from depthmix.method.head import LinearHead, LogitTransform, ModuleHead, head_projection
from models import ANATOMIES, CAP, VOCABULARY, randomise, tiny_model

D, V = 6, 13


class Problem:
    """Random states, gate and labels of a loss under any head."""

    def __init__(self, n=7, k=3, dtype=torch.float64):
        self.states = torch.randn(n, k, D, dtype=dtype, requires_grad=True)
        wide = torch.promote_types(dtype, torch.float32)
        self.gate = torch.randn(n, k, dtype=wide).softmax(-1).requires_grad_()
        self.labels = torch.randint(V, (n,))

    def fused(self, projection, weight=0.7):
        transform = LogitTransform(cap=2.0)
        return ensemble_loss(self.states, self.gate, self.labels, projection, transform, weight)

    def naive(self, module, weight=0.7, rows=slice(None)):
        raw = module(self.states[rows]).to(self.gate.dtype)
        return reference.loss(
            raw, self.gate[rows], self.labels[rows], lambda raw: 2 * torch.tanh(raw / 2), weight
        )

    def gradients(self, loss, module):
        trained = [p for p in module.parameters() if p.requires_grad]
        return grad(loss, [self.states, self.gate, *trained])


class Scaled(nn.Linear):
    """A linear head by inheritance, which is not one."""

    def forward(self, x):
        return 0.5 * super().forward(x)


def lora_head(dtype=torch.float64):
    wrapped = get_peft_model(
        nn.Sequential(nn.Linear(D, V, bias=False)), LoraConfig(r=2, target_modules=["0"])
    )
    return randomise(wrapped.base_model.model[0]).to(dtype)


def patched_head():
    head = nn.Linear(D, V).double()
    forward = head.forward
    head.forward = lambda x: forward(x) + 1
    return head


def half_frozen_head():
    head = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, V)).double()
    head[0].requires_grad_(False)
    return head


MODULES = {
    "linear": lambda: nn.Linear(D, V).double(),
    "linear without bias": lambda: nn.Linear(D, V, bias=False).double(),
    "subclass": lambda: Scaled(D, V).double(),
    "patched": patched_head,
    "lora": lora_head,
    "low rank": lambda: nn.Sequential(nn.Linear(D, 2), nn.Linear(2, V)).double(),
    "half frozen": half_frozen_head,
    "frozen": lambda: Scaled(D, V).double().requires_grad_(False),
}


@pytest.mark.parametrize("weight", [0.0, 0.7])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_loss_through_any_head_equals_the_reference(monkeypatch, make, weight):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 2 * 4 * 3 * V)
    problem, module = Problem(), make()
    projection = head_projection(module, torch.float64, V, None)
    assert isinstance(projection, LinearHead) == (make in list(MODULES.values())[:2])
    fused, expected = problem.fused(projection, weight).total, problem.naive(module, weight)
    assert_close(fused, expected)
    assert_close(problem.gradients(fused, module), problem.gradients(expected, module))
    upstream = torch.randn(7, dtype=torch.float64)
    fused = (upstream * problem.fused(projection, weight).per_token).sum()
    expected = sum(upstream[i] * problem.naive(module, weight, [i]) for i in range(7))
    assert_close(problem.gradients(fused, module), problem.gradients(expected, module))


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("name", ["lora", "subclass"])
def test_module_head_on_almost_no_tokens(name, n):
    problem, module = Problem(n), MODULES[name]()
    fused = problem.fused(ModuleHead(module, torch.float64, V, None)).total
    expected = problem.naive(module)
    assert_close(fused, expected)
    assert_close(problem.gradients(fused, module), problem.gradients(expected, module))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "autocast", "tolerance"),
    [
        (torch.float64, None, 1e-9),
        (torch.float32, None, 1e-5),
        (torch.bfloat16, None, 2e-2),
        (torch.float32, torch.bfloat16, 2e-2),
    ],
)
def test_module_head_equals_linear_head(k, dtype, autocast, tolerance):
    problem, module = Problem(20, k, dtype), nn.Linear(D, V).to(dtype)
    linear = head_projection(module, dtype, V, autocast)
    called = ModuleHead(module, dtype, V, autocast)
    assert isinstance(linear, LinearHead)
    one, other = problem.fused(linear).total, problem.fused(called).total
    assert_close(one, other, rtol=tolerance, atol=0)
    for a, b in zip(problem.gradients(one, module), problem.gradients(other, module), strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= tolerance * b.norm()


def test_autocast_casts_the_weight_once_and_its_gradient_back():
    module = nn.Linear(D, V)
    projection = head_projection(module, torch.float32, V, torch.bfloat16)
    assert projection.dtype == torch.bfloat16
    assert [t.dtype for t in projection.tensors] == [torch.bfloat16] * 2
    problem = Problem(dtype=torch.bfloat16)
    problem.fused(projection).total.backward()
    assert module.weight.grad.dtype == torch.float32
    assert module.weight.grad.any()


def test_module_head_lists_what_is_trained():
    module = lora_head()
    projection = ModuleHead(module, torch.float64, V, None)
    assert {t.shape for t in projection.tensors} == {(2, D), (V, 2)}
    assert (projection.dtype, projection.vocabulary) == (torch.float64, V)


def test_logits_of_a_module_head_end_with_their_chunk(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 2 * 4 * 3 * V)
    module, problem, alive = lora_head(), Problem(), []
    outputs: list[weakref.ref[torch.Tensor]] = []

    def keep(_module, _args, output):
        alive.append(sum(ref() is not None for ref in outputs))
        outputs.append(weakref.ref(output))

    module.register_forward_hook(keep)
    loss = problem.fused(ModuleHead(module, torch.float64, V, None)).total
    assert len(outputs) == 4
    assert max(alive) <= 1, "logits of several chunks at a time"
    assert loss.requires_grad
    assert all(ref() is None for ref in outputs), "logits outlive the loss"


@pytest.mark.parametrize(
    "transform",
    [LogitTransform(), LogitTransform(0.25), LogitTransform(cap=2.0), LogitTransform(3.0, 2.0)],
    ids=str,
)
def test_transform_pulls_gradients_back_as_autograd(transform):
    raw = (2 * torch.randn(4, V, dtype=torch.float64)).requires_grad_()
    logits, d_logits = transform(raw), torch.randn(4, V, dtype=torch.float64)
    expected = grad(logits, raw, d_logits)[0] if logits is not raw else d_logits
    assert_close(transform.pull_back(logits.detach(), d_logits.clone()), expected)


@pytest.mark.parametrize(
    ("model_type", "transform"),
    [("gemma2", LogitTransform(cap=CAP)), ("granite", LogitTransform(0.25))],
)
def test_transform_is_what_the_model_does(model_type, transform):
    raw = torch.linspace(-20, 20, VOCABULARY)
    model = tiny_model(model_type)
    model.get_output_embeddings().register_forward_hook(lambda *_: raw.expand(1, 1, -1))
    with torch.no_grad():
        logits = model(torch.tensor([[5]])).logits[0, 0]
    assert_close(transform(raw), logits)
    assert_close(ANATOMIES[model_type].transform(raw), logits)
