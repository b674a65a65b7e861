"""Log-probabilities that a trainer weighs itself: their gradient against the naive one."""

import pytest
import torch
from torch.autograd import grad
from torch.testing import assert_close

import reference
from depthmix import MoDEConfig
from depthmix.method.head import LinearHead, LogitTransform
from depthmix.method.mixture import DepthMixture
from depthmix.method.objective import training_objective
from depthmix.model.fused_output import weighed_by_the_caller
from models import PLAIN, perturb

N, K, D, V = 6, 3, 5, 11
WEIGHTS = {
    "signed": torch.tensor([0.3, -1.2, 0.0, 2.0, -0.1, 0.7], dtype=torch.float64),
    "alike": torch.full((N,), -1 / N, dtype=torch.float64),
}


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("into", ["layers", "adaptation"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradient_carries_the_rest_of_the_objective(weights, signed, into, temperature):
    """Signed: weights x (log p - D). Otherwise weights x log p + mean size of the weights x D."""
    settings = {"distill_weight": 0.6, "divergence": "js", "balance_weight": 0.2}
    config = MoDEConfig(k=K, distill_into=into, **settings, **PLAIN)
    mixture = DepthMixture(config, D, {"config": config.to_dict()}).double()
    perturb(mixture)
    normed = torch.randn(N, K, D, dtype=torch.float64, requires_grad=True)
    head = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (N,))
    transform = LogitTransform(scale=0.5, cap=4.0).at(temperature)
    inputs = [normed, head, *mixture.parameters()]

    objective = training_objective(
        mixture, normed, labels, LinearHead(head, None), 1.0, transform, False
    )
    log_p = weighed_by_the_caller(objective, signed)

    def logits(raw):
        return 4 * torch.tanh(0.5 * raw / 4) / temperature

    into_layers = into == "layers"
    states = reference.adapted(mixture, normed)
    late = reference.adapted(mixture, normed if into_layers else normed.detach())[:, :-1]
    late_raw = late @ (head if into_layers else head.detach()).T
    gate = reference.gate(mixture, normed)
    log_q = logits(late_raw).log_softmax(-1)
    last = logits(states[:, -1:] @ head.T).log_softmax(-1).detach()
    distillation = 0.6 * reference.js(last, log_q).mean(1)
    balance = 0.2 * ((gate * gate.log()).sum(-1) + torch.tensor(float(K)).log())
    ensemble = logits((gate.unsqueeze(-1) * (states @ head.T)).sum(1)).log_softmax(-1)
    naive_log_p = ensemble.gather(1, labels.unsqueeze(1)).squeeze(1)
    assert_close(log_p, naive_log_p)

    size = weights.abs().mean()
    wanted = (weights * naive_log_p).sum() + size * balance.sum()
    wanted = wanted + ((-weights if signed else size) * distillation).sum()
    ours = grad((weights * log_p).sum(), inputs)
    assert_close(ours, grad(wanted, inputs), rtol=1e-5, atol=1e-6)


def test_no_token_at_all_stays_connected():
    config = MoDEConfig(k=K, **PLAIN)
    mixture = DepthMixture(config, D, {"config": config.to_dict()})
    head, normed = torch.randn(V, D), torch.randn(0, K, D, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.long)
    objective = training_objective(
        mixture, normed, nothing, LinearHead(head, None), 1.0, LogitTransform(), False
    )
    weighed_by_the_caller(objective, False).sum().backward()
    assert normed.grad.shape == (0, K, D)
