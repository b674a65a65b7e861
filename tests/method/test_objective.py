"""The training objective: its terms one by one, then whole models against the reference."""

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch
from peft import LoraConfig
from torch.autograd import grad
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import depthmix
import reference
from depthmix import MoDEConfig
from depthmix.errors import TrainingError
from depthmix.method.head import LinearHead, LogitTransform
from depthmix.method.mixture import DepthMixture
from depthmix.method.objective import training_objective
from depthmix.model.runtime import runtime_of
from models import (
    ANATOMIES,
    GROUPED,
    PLAIN,
    TYPES,
    Anatomy,
    attached,
    choose_last_layer,
    perturb,
    randomise,
    tiny_model,
    token_ids,
)

IGNORED = -100
D, V = 6, 13
CONFIGS = [
    {},
    {"k": 4},
    {"router_prior": 0.9},
    {"distill_into": "layers"},
    {"distill_into": "layers", "divergence": "reverse_kl", "distill_weight": 0.3},
    {"divergence": "js"},
    {"distill_weight": 0.0},
    {"distill_weight": 0.0, "adaptation": "none"},
    {"adaptation": "none", "distill_into": "layers"},
    {"adaptation": "low_rank", "adaptation_rank": 2},
    {"adaptation": "affine", "distill_into": "layers"},
    {"router_input": "first"},
    {"router_input": "all", "balance_weight": 0.5},
    {"router_top_k": 2, "balance_weight": 0.5},
    {"router_top_k": 1},
]


# --- the objective alone


class Problem:
    """Normed states, labels, a perturbed mixture and a head."""

    def __init__(self, n=6, dtype=torch.float64, **config):
        self.config = MoDEConfig(**(PLAIN | config))
        self.mixture = DepthMixture(self.config, D, {"config": self.config.to_dict()})
        perturb(self.mixture)
        self.normed = torch.randn(n, self.config.k, D, dtype=dtype, requires_grad=True)
        self.labels = torch.randint(V, (n,))
        self.weight = torch.randn(V, D, dtype=dtype, requires_grad=True)
        self.inputs = [self.normed, self.weight, *self.mixture.parameters()]

    def under(self, **changes):
        """Return the same problem, tensors and all, under another configuration."""
        twin = copy.copy(self)
        twin.mixture = copy.copy(self.mixture)
        twin.mixture.config = twin.config = dataclasses.replace(self.config, **changes)
        return twin

    def objective(self, head_scale=1.0, hold_router=False):
        return training_objective(
            self.mixture,
            self.normed,
            self.labels,
            LinearHead(self.weight, None),
            head_scale,
            LogitTransform(),
            hold_router,
        )

    def gradients(self, total):
        return [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(
                self.inputs, grad(total, self.inputs, allow_unused=True), strict=True
            )
        ]


def test_distilling_on_a_fraction_is_unbiased(monkeypatch):
    """The mean over all orders of the tokens, which are equally likely, is the full objective."""
    whole = Problem(n=4)
    half = whole.under(distill_fraction=0.5)
    orders = [torch.tensor(order) for order in itertools.permutations(range(4))]
    totals, gradients, per_token = [], [], []
    for order in orders:
        monkeypatch.setattr(torch, "randperm", lambda n, order=order, **_: order[:n])
        objective = half.objective()
        totals.append(objective.total.detach())
        per_token.append(objective.per_token)
        gradients.append(half.gradients(objective.total))
    expected = whole.objective()
    assert torch.stack(totals).std() > 1e-3
    assert_close(torch.stack(totals).mean(), expected.total.detach())
    assert_close(torch.stack(per_token).mean(0), expected.per_token)
    means = [torch.stack(draws).mean(0) for draws in zip(*gradients, strict=True)]
    assert_close(means, whole.gradients(expected.total))


@pytest.mark.parametrize(
    ("n", "fraction", "sampled"), [(8, 0.25, 2), (8, 0.01, 1), (3, 0.9, 3), (1, 0.1, 1)]
)
def test_a_fraction_of_the_tokens_is_distilled(n, fraction, sampled):
    problem = Problem(n, distill_fraction=fraction)
    objective = problem.objective()
    assert (objective.loss.divergence > 0).sum() == sampled
    # The cross-entropy is of all tokens, in their order.
    full = problem.under(distill_fraction=1.0).objective().loss
    assert_close(objective.loss.cross_entropy, full.cross_entropy)
    assert_close(objective.loss.entropy, full.entropy)
    assert torch.equal(objective.loss.correct, full.correct)
    chosen = objective.loss.divergence > 0
    assert_close(objective.loss.divergence[chosen], full.divergence[chosen] * n / sampled)


def test_draws_of_the_fraction_differ():
    problem = Problem(n=20, distill_fraction=0.2)
    draws = {tuple(problem.objective().loss.divergence.nonzero()[:, 0].tolist()) for _ in range(5)}
    assert len(draws) > 1


def test_fraction_of_no_token_is_a_connected_zero():
    problem = Problem(n=0, distill_fraction=0.5)
    total = problem.objective().total
    assert total.item() == 0
    assert not any(gradient.any() for gradient in problem.gradients(total))


@pytest.mark.parametrize("into", ["adaptation", "layers"])
def test_held_router_gets_a_zero_gradient_and_nothing_else_changes(into):
    problem = Problem(balance_weight=0.3, distill_into=into)
    free, held = problem.objective(), problem.objective(hold_router=True)
    assert_close(held.total, free.total)
    free.total.backward()
    moved = {n: p.grad for n, p in problem.mixture.named_parameters()}
    problem.mixture.zero_grad()
    held.total.backward()
    for name, parameter in problem.mixture.named_parameters():
        assert parameter.grad is not None
        if name.startswith("router"):
            assert moved[name].any()
            assert not parameter.grad.any()
        else:
            assert_close(parameter.grad, moved[name])


def test_balance_is_the_divergence_of_the_gate_from_uniform():
    problem = Problem(balance_weight=0.7)
    objective = problem.objective()
    uniform = torch.full_like(objective.gate, 1 / 3)
    expected = (objective.gate * (objective.gate / uniform).log()).sum(-1)
    assert_close(objective.balance, expected)
    without = problem.under(balance_weight=0.0).objective()
    assert_close(objective.total - without.total, 0.7 * expected.sum())


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_balance_is_zero_when_uniform_log_k_when_one_hot_and_always_finite(top_k):
    problem = Problem(balance_weight=1.0, router_top_k=top_k)
    choose_last_layer(problem.mixture)
    collapsed = problem.objective()
    assert_close(collapsed.balance, torch.full_like(collapsed.balance, math.log(3)))
    assert all(gradient.isfinite().all() for gradient in problem.gradients(collapsed.total))
    if top_k is None:
        torch.nn.init.zeros_(problem.mixture.router.weight)
        torch.nn.init.zeros_(problem.mixture.router.bias)
        balance = problem.objective().balance
        assert_close(balance, torch.zeros_like(balance), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    "config", [{}, {"balance_weight": 0.4}, {"distill_weight": 0.0}, {"distill_fraction": 0.5}]
)
def test_total_is_the_sum_over_tokens(config):
    problem = Problem(**config)
    objective = problem.objective()
    parts = objective.loss.cross_entropy + problem.config.distill_weight * objective.loss.divergence
    assert_close(objective.per_token, parts + problem.config.balance_weight * objective.balance)
    assert_close(objective.per_token.sum(), objective.total)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("into", ["adaptation", "layers"])
def test_scale_between_norm_and_head_is_that_of_the_head(into, weight):
    problem = Problem(distill_into=into, distill_weight=weight)
    scaled = problem.objective(head_scale=0.3)
    d_normed, d_weight, *d_mixture = problem.gradients(scaled.total)
    with torch.no_grad():
        problem.weight *= 0.3
    expected = problem.objective()
    d_normed_too, d_weight_too, *d_mixture_too = problem.gradients(expected.total)
    assert_close(scaled.total, expected.total)
    assert_close([d_normed, *d_mixture], [d_normed_too, *d_mixture_too])
    assert_close(d_weight, 0.3 * d_weight_too)


def test_distillation_into_the_adaptation_stays_out_of_the_layers():
    problem = Problem()
    d_normed, _, d_scale, *_ = problem.gradients(problem.objective().total)
    alone = problem.under(distill_weight=0.0).objective()
    d_normed_alone, _, d_scale_alone, *_ = problem.gradients(alone.total)
    assert_close(d_normed, d_normed_alone)
    assert not torch.allclose(d_scale[:-1], d_scale_alone[:-1])
    assert_close(d_scale[-1], d_scale_alone[-1])


# --- whole models


def labels_of(ids):
    """Supervise some tokens: none of the first, all of the end of each row but its last."""
    labels = ids.clone()
    labels[:, :3] = IGNORED
    labels[0, -1] = IGNORED
    return labels


def close(ours, theirs, tolerance=2e-5, floor=1e-6):
    return (ours - theirs).norm() <= tolerance * theirs.norm() + floor


def assert_equals_reference(model, base, anatomy, labels=None, tolerance=2e-5, **inputs):
    """Loss and the gradient of every parameter, of the base model and of MoDE."""
    inputs = inputs or {"input_ids": token_ids()}
    labels = labels_of(token_ids()) if labels is None else labels
    twin, mixture = copy.deepcopy(base).train(), copy.deepcopy(model.depthmix)
    loss = model.train()(**inputs, labels=labels).loss
    count = (labels[:, 1:] != IGNORED).sum().clamp_min(1)
    expected = reference.objective(twin, anatomy, mixture, labels, **inputs) / count
    assert_close(loss, expected, rtol=tolerance, atol=1e-6)
    loss.backward()
    expected.backward()
    theirs = dict(twin.named_parameters())
    theirs |= {f"depthmix.{name}": p for name, p in mixture.named_parameters()}
    ours = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        if theirs[name].grad is None:
            assert parameter.grad is None, name
        else:
            assert close(parameter.grad, theirs[name].grad, tolerance), name


@pytest.mark.parametrize("into", ["adaptation", "layers"])
@pytest.mark.parametrize("model_type", TYPES)
def test_full_fine_tuning_equals_the_reference(model_type, into):
    base = tiny_model(model_type)
    model = attached(base, distill_into=into)
    assert_equals_reference(model, base, ANATOMIES[model_type])


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_every_configuration_equals_the_reference(model_type, config):
    base = tiny_model(model_type)
    assert_equals_reference(attached(base, **config), base, ANATOMIES[model_type])


@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", True), ("qwen2", False), ("gpt2", False), ("phi", True)]
)
def test_tied_and_untied_heads_equal_the_reference(model_type, tied):
    base = tiny_model(model_type, tie_word_embeddings=tied)
    same = base.get_input_embeddings().weight is base.get_output_embeddings().weight
    assert same == tied
    assert_equals_reference(attached(base), base, ANATOMIES[model_type])


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_bf16_model_is_as_close_as_its_rounding(model_type):
    base = tiny_model(model_type).to(torch.bfloat16)
    model = attached(base, distill_into="layers")
    assert_equals_reference(model, base, ANATOMIES[model_type], tolerance=5e-2)


@pytest.mark.parametrize("model_type", TYPES)
def test_padded_batch_equals_the_reference(model_type):
    base = tiny_model(model_type)
    ids, mask = token_ids(3, 8), torch.ones(3, 8, dtype=torch.long)
    mask[1, :3], mask[2, 5:] = 0, 0
    ids[mask == 0] = 0
    labels = ids.masked_fill(mask == 0, IGNORED)
    assert_equals_reference(
        attached(base), base, ANATOMIES[model_type], labels, input_ids=ids, attention_mask=mask
    )


@pytest.mark.parametrize("supervised", [[], [(0, 4)], [(1, 8)], [(0, 0)]], ids=str)
def test_few_supervised_tokens(supervised):
    base = tiny_model("llama")
    labels = torch.full((2, 9), IGNORED)
    for place in supervised:
        labels[place] = 5
    assert_equals_reference(attached(base), base, ANATOMIES["llama"], labels)


def test_no_supervised_token_gives_a_connected_zero():
    model = attached(tiny_model("llama")).train()
    loss = model(token_ids(), labels=torch.full((2, 9), IGNORED)).loss
    loss.backward()
    assert loss.item() == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("model_type", TYPES)
def test_one_layer_trains_as_the_base_model_alone(model_type):
    base = tiny_model(model_type).train()
    model = attached(base, k=1).train()
    ids, labels = token_ids(), labels_of(token_ids())
    ours, theirs = model(ids, labels=labels), base(ids, labels=labels)
    assert_close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    for name, parameter in base.named_parameters():
        assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert model.num_parameters() == base.num_parameters()


@pytest.mark.parametrize("count", [None, 5, torch.tensor(5), torch.tensor(40.0)], ids=str)
def test_items_in_batch_scale_as_in_transformers(count):
    base = tiny_model("llama").train()
    model = attached(base, perturbed=False, distill_weight=0.0).train()
    choose_last_layer(model.depthmix)
    inputs = {"input_ids": token_ids(), "labels": labels_of(token_ids())}
    ours = model(**inputs, num_items_in_batch=count).loss
    assert_close(ours, base(**inputs, num_items_in_batch=count).loss)


@pytest.mark.parametrize("config", [{}, {"balance_weight": 0.5}, {"distill_into": "layers"}])
def test_batch_is_the_sum_of_its_rows(config):
    model = attached(tiny_model("llama"), **config).train()
    ids, labels = token_ids(), labels_of(token_ids())
    model(ids, labels=labels, num_items_in_batch=11).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row in range(2):
        one = slice(row, row + 1)
        model(ids[one], labels=labels[one], num_items_in_batch=11).loss.backward()
    assert all(close(p.grad, whole[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("model_type", TYPES)
def test_evaluation_is_the_cross_entropy_of_the_ensemble(model_type):
    base = tiny_model(model_type)
    model, anatomy = attached(base), ANATOMIES[model_type]
    ids, labels = token_ids(), labels_of(token_ids())
    with torch.no_grad():
        output = model(ids, labels=labels)
        logits = reference.logits(base, anatomy, model.depthmix, input_ids=ids)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert_close(output.loss, expected)
    assert_close(output.logits, logits, rtol=1e-4, atol=1e-5)


def test_training_without_labels_returns_the_logits_of_the_ensemble():
    model = attached(tiny_model("llama"))
    expected = model(token_ids()).logits
    output = model.train()(token_ids())
    assert output.loss is None
    assert_close(output.logits, expected)
    output.logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_ways_to_pass_labels_agree():
    model = attached(tiny_model("llama")).train()
    ids, labels = token_ids(), labels_of(token_ids())
    shifted = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    expected = model(input_ids=ids, labels=labels)
    with pytest.raises(TrainingError, match="makes no logits"):
        _ = expected.logits[0]
    assert torch.equal(model(ids, labels=labels).loss, expected.loss)
    assert torch.equal(model(ids, None, None, None, None, labels).loss, expected.loss)
    assert torch.equal(model(ids, shift_labels=shifted, labels=labels).loss, expected.loss)
    assert torch.equal(model(ids, shift_labels=shifted).loss, expected.loss)
    assert torch.equal(model(ids, labels=labels, return_dict=False)[0], expected.loss)
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded, labels=labels).loss, expected.loss)


def test_failed_forward_leaves_nothing_behind():
    model = attached(tiny_model("llama"))
    expected = model(token_ids()).logits

    def fail(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.train()(token_ids(), labels=token_ids())
    handle.remove()
    assert torch.equal(model(token_ids()).logits, expected)
    assert torch.equal(model.eval()(token_ids()).logits, expected)


@pytest.mark.parametrize("where", ["around the call", "inside forward"])
def test_autocast_region_of_the_model_is_that_of_the_loss(where):
    base = tiny_model("llama")
    model = attached(base).train()
    inputs = {"input_ids": token_ids(), "labels": labels_of(token_ids())}
    exact = model(**inputs).loss
    mixture = copy.deepcopy(model.depthmix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = reference.objective(base, ANATOMIES["llama"], mixture, **inputs) / 11
        around = model(**inputs).loss
    loss = around
    if where == "inside forward":  # as accelerate does it: our hooks run outside of the region
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
        loss = model(**inputs).loss
        assert torch.equal(loss, around)
    assert not torch.equal(loss, exact)
    assert loss.dtype == torch.float32
    assert_close(loss, expected, rtol=1e-3, atol=0)
    loss.backward()
    expected.backward()
    for name, parameter in base.named_parameters():
        assert close(model.get_parameter(name).grad, parameter.grad, 5e-2), name
    for name, parameter in mixture.named_parameters():
        assert close(model.depthmix.get_parameter(name).grad, parameter.grad, 5e-2), name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("model_type", TYPES)
def test_gradient_checkpointing_gives_the_same_gradients(model_type, reentrant):
    base = tiny_model(model_type)
    model = attached(base, distill_into="layers").train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inputs = {"input_ids": token_ids(), "labels": labels_of(token_ids()), "use_cache": False}
    calls = []
    inner = next(twin.get_submodule(ANATOMIES[model_type].layers)[-1].children())
    inner.register_forward_hook(lambda *_: calls.append(1))
    plain, checkpointed = model(**inputs).loss, twin(**inputs).loss
    assert_close(plain, checkpointed, rtol=1e-6, atol=0)
    plain.backward()
    checkpointed.backward()
    assert len(calls) == 2, "nothing was computed again"
    for name, parameter in model.named_parameters():
        assert close(twin.get_parameter(name).grad, parameter.grad), name


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_that_hides_the_layers_is_refused(monkeypatch, reentrant):
    """As in versions of transformers that checkpoint the call of a layer, hooks and all."""
    base = tiny_model("llama").train()
    model = attached(base).train()
    call = LlamaDecoderLayer.__call__
    monkeypatch.setattr(
        LlamaDecoderLayer,
        "__call__",
        lambda self, state, **kwargs: checkpoint(
            functools.partial(call, self, **kwargs), state, use_reentrant=reentrant
        ),
    )
    if reentrant:
        with pytest.raises(TrainingError, match="use_reentrant"):
            model(token_ids(), labels=token_ids())
    else:
        assert_equals_reference(model, base, ANATOMIES["llama"])


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]], ids=str)
def test_lora_equals_the_reference(targets):
    """Also with LoRA on the head itself, which is then called as a module."""
    base = tiny_model("llama")
    lora = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    wrapped = depthmix.attach(copy.deepcopy(base), MoDEConfig(**PLAIN), lora)
    mixture = wrapped.base_model.model.depthmix.modules_to_save["default"]
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    perturb(mixture)
    ids, labels = token_ids(), labels_of(token_ids())
    loss = wrapped.train()(input_ids=ids, labels=labels).loss
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    ours = dict(zip(trained, grad(loss, list(trained.values())), strict=True))
    host = depthmix.detach(wrapped).get_base_model()
    expected = reference.objective(host, ANATOMIES["llama"], mixture, labels, input_ids=ids)
    theirs = grad(expected / 11, list(trained.values()))
    assert_close(loss, expected / 11)
    assert sum("lm_head" in name for name in trained) == 2 * ("lm_head" in targets)
    for name, gradient in zip(trained, theirs, strict=True):
        assert close(ours[name], gradient), name


def test_frozen_base_gets_no_gradient_and_keeps_no_graph():
    base = tiny_model("llama").requires_grad_(False)
    model = attached(base).train()
    assert {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"depthmix"}
    states = []
    model.model.norm.register_forward_hook(lambda _m, _a, output: states.append(output))
    model(token_ids(), labels=token_ids()).loss.backward()
    assert not states[0].requires_grad
    assert all((p.grad is None) != p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("head", ["full", "tied", "lora"])
def test_distillation_into_the_adaptation_never_trains_the_head(head):
    """Gradients of head and embeddings do not change with the weight of the distillation."""
    base = tiny_model("llama", tie_word_embeddings=head == "tied")
    found = []
    for weight in (0.0, 3.0):
        torch.manual_seed(0)
        mode = MoDEConfig(**PLAIN, distill_weight=weight, distill_into="adaptation")
        peft_config = LoraConfig(target_modules=["lm_head", "q_proj"]) if head == "lora" else None
        model = depthmix.attach(copy.deepcopy(base), mode, peft_config)
        runtime = runtime_of(model)
        torch.manual_seed(1)
        perturb(runtime.mixture())
        model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    plain, distilled = found
    moved = {n for n, g in plain.items() if (distilled[n] - g).norm() > 1e-4 * g.norm()}
    assert moved
    assert {n for n in moved if "depthmix.norm" not in n and "modules_to_save" not in n} == set()
    assert any("lm_head" in n or "embed_tokens" in n for n in plain)


def test_scale_between_norm_and_head_of_a_model():
    base = tiny_model("llama")
    base.lm_head.register_forward_pre_hook(lambda _m, args: (args[0] * 0.5,))
    model = attached(base)
    assert runtime_of(model).anatomy.head_scale == pytest.approx(0.5)
    assert_equals_reference(model, base, ANATOMIES["llama"])


def test_loss_of_the_experts_is_added():
    config = MixtralConfig(**GROUPED, num_local_experts=4, output_router_logits=True)
    base = randomise(MixtralForCausalLM(config))
    model = attached(base).train()
    ids, labels = token_ids(), labels_of(token_ids())
    output = model(ids, labels=labels)
    expected = reference.objective(base, Anatomy(None, {}), model.depthmix, labels, input_ids=ids)
    assert output.aux_loss > 0
    assert_close(output.loss, expected / 11 + base.router_aux_loss_coef * output.aux_loss)


def test_smallest_gradient_that_survives_in_half_precision():
    """The loss forms its gradients in the forward, before a GradScaler lifts them.

    The model is sure of the label: every other token has a probability, and its logit a slope, of
    e^-18 = 1.5e-8. Half precision alone holds nothing below 6e-8.
    """
    vocabulary, n = 50, 8
    weight = torch.zeros(vocabulary, D)
    weight[0, 0] = 18.0
    normed, labels = torch.zeros(n, 3, D), torch.zeros(n, dtype=torch.long)
    normed[..., 0] = 1.0

    def slope(dtype, scale=2.0**16):  # of a GradScaler
        mode = MoDEConfig(**PLAIN)
        mixture = DepthMixture(mode, D, {"config": mode.to_dict()})
        head = weight.to(dtype).requires_grad_()
        total = training_objective(
            mixture, normed.to(dtype), labels, LinearHead(head, None), 1.0, LogitTransform(), False
        ).total
        return grad(scale * total / n, head)[0][1:, 0].double() / scale

    whole, half = slope(torch.float32), slope(torch.float16)
    assert_close(whole, torch.full_like(whole, math.exp(-18)), rtol=1e-3, atol=0)
    assert_close(half, whole, rtol=1e-2, atol=0)


def test_statistics_are_means_over_the_tokens_of_all_forwards():
    base = tiny_model("llama")
    model = attached(base, distill_weight=1.0).train()
    statistics = runtime_of(model).statistics
    assert statistics.take() is None
    parts = []
    for labels in (labels_of(token_ids()), token_ids()):
        loss = model(token_ids(), labels=labels).loss
        parts.append((loss.item(), (labels[:, 1:] != IGNORED).sum().item()))
    figures = statistics.summarize(statistics.take())
    assert statistics.take() is None
    mean = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
    assert figures["ce_loss"] + figures["distill_loss"] == pytest.approx(mean, rel=1e-5)
    gates = [figures[f"router_weight/layer_{layer}"] for layer in (1, 2, 3)]
    assert sum(gates) == pytest.approx(1)
    with torch.no_grad(), depthmix.routing(model) as record:
        model.eval()(token_ids())
    supervised = [record.gates[0][:, :-1][labels_of(token_ids())[:, 1:] != IGNORED]]
    supervised.append(record.gates[0][:, :-1].flatten(0, 1))
    gate = torch.cat(supervised)
    assert gates == pytest.approx(gate.mean(0).tolist(), rel=1e-4)
    entropy = torch.distributions.Categorical(probs=gate).entropy().mean().item()
    assert figures["router_entropy"] == pytest.approx(entropy, rel=1e-4)
