"""Classifiers of sequences: an ensemble of pooled late layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import nn
from transformers import BartConfig, BartForSequenceClassification, Trainer, TrainingArguments

import depthmix
import reference
from depthmix.carry.adapters import mode_only_config
from depthmix.errors import DiscoveryError, TrainingError
from depthmix.model.classifier import distillation
from models import PLAIN, attached, choose_last_layer, perturb, token_ids
from task_models import CLASSES, CLASSIFIERS, build

K = 3
IDS = token_ids(4, 9)
LABELS = torch.tensor([0, 2, 1, 2])


def ensemble(base, model, name):
    """The gate of the picked token, and the scores of every layer alone, by the reference."""
    task = CLASSIFIERS[name]
    normed = reference.head_inputs(base, task.layers, task.head, K, input_ids=IDS)
    if normed.ndim == 4:  # a decoder: its last token
        normed = normed[:, -1]
    head = base.get_submodule(task.head)
    return reference.gate(model.depthmix, normed), head(reference.adapted(model.depthmix, normed))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_one_hot_router_is_the_base_model_bit_for_bit(name):
    base = build(CLASSIFIERS[name])
    model = attached(base, perturbed=False, k=K)
    choose_last_layer(model.depthmix)
    with torch.no_grad():
        expected = base(input_ids=IDS, labels=LABELS)
        found = model(input_ids=IDS, labels=LABELS)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_equal_the_reference(name):
    base = build(CLASSIFIERS[name])
    model = attached(base, k=K)
    with torch.no_grad():
        gate, scores = ensemble(base, model, name)
        found = model(input_ids=IDS).logits
    torch.testing.assert_close(found, (gate.unsqueeze(-1) * scores).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "js"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_loss_and_gradients_equal_the_reference(name, divergence):
    base = build(CLASSIFIERS[name])
    model = attached(
        base,
        k=K,
        distill_weight=0.7,
        divergence=divergence,
        distill_into="layers",
        balance_weight=0.3,
    ).train()
    loss = model(input_ids=IDS, labels=LABELS).loss
    loss.backward()
    ours = {n: p.grad.clone() for n, p in model.depthmix.named_parameters()}
    model.zero_grad()
    gate, scores = ensemble(base, model, name)
    total = reference.loss(scores, gate, LABELS, weight=0.7, divergence=divergence)
    balance = (gate * (gate.log() + torch.tensor(float(K)).log())).sum(1).mean()
    wanted = total / len(LABELS) + 0.3 * balance
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)
    wanted.backward()
    for n, p in model.depthmix.named_parameters():
        torch.testing.assert_close(ours[n], p.grad, rtol=1e-3, atol=1e-4, msg=n)


def test_distillation_into_the_adaptation_leaves_the_trunk_alone():
    """With the ensemble on the last layer, nothing else could move the layers below it."""
    base = build(CLASSIFIERS["bert"])
    gradients = []
    for into in ("adaptation", "layers"):
        model = attached(base, k=K, distill_weight=1.0, distill_into=into).train()
        choose_last_layer(model.depthmix)
        with torch.no_grad():
            model.depthmix.router.weight.zero_()
        with_distillation = model(input_ids=IDS, labels=LABELS).loss
        alone = F.cross_entropy(model(input_ids=IDS).logits, LABELS)
        (with_distillation - alone).backward()
        gradients.append(model.bert.encoder.layer[0].attention.self.query.weight.grad.norm())
        assert model.depthmix.norm.scale.grad.norm() > 0
    assert gradients[0] < 1e-5 < gradients[1]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_distillation_into_the_adaptation_never_trains_the_head(name):
    base, found = build(CLASSIFIERS[name]), []
    for weight in (0.5, 3.0):
        model = attached(base, perturbed=False, k=K, distill_weight=weight).train()
        torch.manual_seed(0)
        perturb(model.depthmix)
        model(input_ids=IDS, labels=LABELS).loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    moved = {n for n, g in found[0].items() if (found[1][n] - g).norm() > 1e-4 * g.norm()}
    assert moved
    assert {n for n in moved if not n.startswith("depthmix.norm")} == set()
    assert any(n.startswith(CLASSIFIERS[name].head) for n in found[0])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_full_fine_tuning_in_bf16(name, tmp_path):
    """The Trainer wraps the forward in autocast; the further loss is computed outside of it."""
    rows = [
        {"input_ids": IDS[i].tolist(), "attention_mask": [1] * IDS.shape[1], "labels": i % 3}
        for i in (0, 1)
    ]
    losses = []
    for bf16 in (True, False):
        model = attached(build(CLASSIFIERS[name]), perturbed=False, k=K, distill_weight=1.0)
        options = {"max_steps": 2, "logging_steps": 1, "report_to": [], "save_strategy": "no"}
        arguments = TrainingArguments(
            str(tmp_path), bf16=bf16, use_cpu=True, disable_tqdm=True, **options
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.state.log_history[0]["distill_loss"] > 0
    assert losses[0] == pytest.approx(losses[1], rel=5e-2)


@pytest.mark.parametrize("rows", [1, 2])
def test_lora_on_the_head_that_gets_stacked_states(rows):
    """PEFT wraps the head: the mixture is made once, in front of the wrapper, for every row."""
    base = build(CLASSIFIERS["roberta"])
    model = attached(base)
    expected = model(input_ids=IDS[:rows]).logits
    state = copy.deepcopy(model.depthmix)
    tuned = depthmix.attach(
        base, depthmix.MoDEConfig(**PLAIN), LoraConfig(target_modules="all-linear")
    )
    tuned.get_base_model().depthmix.modules_to_save["default"].load_state_dict(state.state_dict())
    found = tuned.eval()(input_ids=IDS[:rows]).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert "lora" in str(type(base.classifier.out_proj)).lower()


def test_several_classes_a_row():
    """Every class is a choice of its own: the divergence is that of two outcomes."""
    scores = torch.randn(4, K, CLASSES, dtype=torch.float64, requires_grad=True)
    found = distillation(scores, "kl", several=True)
    p, q = scores[:, -1:].sigmoid().detach(), scores[:, :-1].sigmoid()
    wanted = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(found, wanted.mean((1, 2)))
    (found.sum() - wanted.mean((1, 2)).sum()).backward()
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores), rtol=0, atol=1e-12)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problems(problem):
    several = problem == "multi_label_classification"
    base = build(CLASSIFIERS["bert"], num_labels=CLASSES if several else 1, problem_type=problem)
    model = attached(base, k=K, distill_weight=1.0).train()
    labels = F.one_hot(LABELS, CLASSES).float() if several else LABELS.float()
    loss = model(input_ids=IDS, labels=labels).loss
    logits = model(input_ids=IDS).logits
    own = (
        F.binary_cross_entropy_with_logits(logits, labels)
        if several
        else F.mse_loss(logits.squeeze(), labels)
    )
    if several:
        assert loss > own
    else:  # one output has no distribution
        torch.testing.assert_close(loss, own)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_gives_what_single_rows_give(side):
    model = attached(build(CLASSIFIERS["llama"]), k=K)
    short = IDS[:1, :5]
    padded = F.pad(short, (4, 0) if side == "left" else (0, 4))
    mask = (padded != 0).long()
    with torch.no_grad():
        batch = model(
            input_ids=torch.cat([padded, IDS[1:2]]),
            attention_mask=torch.cat([mask, torch.ones_like(IDS[1:2])]),
            position_ids=torch.cat([(mask.cumsum(1) - 1).clamp_min(0), torch.arange(9)[None]]),
        ).logits
        single = model(input_ids=short).logits
    torch.testing.assert_close(batch[:1], single, rtol=1e-4, atol=1e-4)


def test_distilled_token_is_the_one_that_the_model_picks():
    """Of a padded row, the last token that is not padding."""
    model = attached(build(CLASSIFIERS["llama"]), k=K, distill_weight=1.0).train()
    losses = []
    for row in (IDS[:1, :5], F.pad(IDS[:1, :5], (0, 4))):
        losses.append(
            model(input_ids=row, attention_mask=(row != 0).long(), labels=LABELS[:1]).loss
        )
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
@pytest.mark.parametrize("before", [True, False], ids=["attach first", "PEFT first"])
def test_lora_trains_saves_loads_and_is_disabled(name, before, tmp_path):
    from peft import get_peft_model

    base = build(CLASSIFIERS[name])
    lora = LoraConfig(r=4, task_type="SEQ_CLS", target_modules="all-linear")
    config = depthmix.MoDEConfig(k=K)
    torch.manual_seed(1)
    model = copy.deepcopy(base)
    if before:
        model = depthmix.attach(model, config, lora)
    else:
        model = depthmix.attach(get_peft_model(model, lora), config)
    steps(model.train(), 6)
    model.eval().save_pretrained(tmp_path)
    loaded = depthmix.load(copy.deepcopy(base), tmp_path)
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        assert torch.equal(loaded(input_ids=IDS).logits, found)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)
        assert not torch.equal(found, base(input_ids=IDS).logits)


def test_mode_alone_trains_the_head_as_well():
    model = depthmix.attach(
        build(CLASSIFIERS["bert"]), depthmix.MoDEConfig(k=K), mode_only_config("SEQ_CLS")
    )
    trained = {n.split(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"depthmix", "classifier"}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointed in (False, True):
        model = attached(build(CLASSIFIERS["bert"]), k=K, distill_weight=0.5).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=LABELS).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


def test_trainer_logs_the_routing(tmp_path):
    model = attached(build(CLASSIFIERS["bert"]), perturbed=False, k=K)
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(IDS, LABELS, strict=True)]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=10,
            learning_rate=3e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            save_strategy="no",
        ),
        train_dataset=rows,
        optimizer_cls_and_kwargs=(
            torch.optim.AdamW,
            {"params": depthmix.param_groups(model, lr=3e-3)},
        ),
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1]["loss"] < logged[0]["loss"]
    weights = [logged[-1][f"router_weight/layer_{i}"] for i in (1, 2, 3)]
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    with depthmix.routing(model) as record:
        model(input_ids=IDS)
    assert record.gates[0].shape == (4, K)
    assert record.mean().sum().item() == pytest.approx(1, abs=1e-5)


def test_frozen_mode_is_refused():
    model = attached(build(CLASSIFIERS["bert"]), k=K).train()
    model.depthmix.requires_grad_(False)
    with pytest.raises(TrainingError, match="frozen"):
        model(input_ids=IDS, labels=LABELS)


def test_what_cannot_be_stacked_is_refused():
    averaging = build(CLASSIFIERS["modernbert"], classifier_pooling="mean")
    with pytest.raises(DiscoveryError, match="number of rows"):
        depthmix.attach(averaging)
    two_sided = BartForSequenceClassification(
        BartConfig(vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2)
    )
    with pytest.raises(DiscoveryError, match="encoder-decoder"):
        depthmix.attach(two_sided)


def test_head_that_is_not_linear_is_refused():
    model = build(CLASSIFIERS["bert"])
    model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 5))
    with pytest.raises(DiscoveryError, match="no linear map to its 3 classes"):
        depthmix.attach(model)


def test_detach_gives_the_base_model_back():
    base = build(CLASSIFIERS["roberta"])
    model = attached(base, k=K)
    depthmix.detach(model)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)


def steps(model, count):
    optimizer = torch.optim.AdamW(depthmix.param_groups(model, lr=1e-2))
    for _ in range(count):
        model(input_ids=IDS, labels=LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
