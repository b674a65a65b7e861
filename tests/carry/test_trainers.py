"""Unmodified trainers, and a hand-written loop, give the same parameters on the same data."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import depthmix
from depthmix.errors import TrainingError
from depthmix.model.runtime import runtime_of
from models import tiny_model, word_tokenizer

IGNORED = -100
LEARNING_RATE = 1e-2


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return tiny_model("llama")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def rows(count: int = 16) -> list[dict[str, list[int]]]:
    """Rows of unequal length, a few supervised tokens each."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        length = 5 + i % 7
        ids = torch.randint(4, 97, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * 2 + ids[2:]})
    return made


def attached(base: LlamaForCausalLM, **config: Any) -> PeftModel:
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return depthmix.attach(
        copy.deepcopy(base), depthmix.MoDEConfig(**({"distill_fraction": 1.0} | config)), lora
    )


def arguments(cls: type, folder: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "train_sampling_strategy": "sequential",
    }
    return cls(**(values | changes))


def optimizer_of(model: PeftModel) -> Any:
    groups = depthmix.param_groups(model, lr=LEARNING_RATE)
    return torch.optim.AdamW, {"params": groups, "lr": LEARNING_RATE}


def train_hf(
    model: PeftModel,
    folder: Path,
    tokenizer: Any,
    keywords: dict[str, Any] | None = None,
    **changes: Any,
) -> Trainer:
    trainer = Trainer(
        model,
        arguments(TrainingArguments, folder, **changes),
        train_dataset=Dataset.from_list(rows()),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        optimizer_cls_and_kwargs=optimizer_of(model),
        **(keywords or {}),
    )
    trainer.train()
    return trainer


def train_sft(
    model: PeftModel,
    folder: Path,
    tokenizer: Any,
    keywords: dict[str, Any] | None = None,
    **changes: Any,
) -> SFTTrainer:
    trainer = SFTTrainer(
        model,
        arguments(SFTConfig, folder, **changes),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_of(model),
        **(keywords or {}),
    )
    trainer.train()
    return trainer


def train_by_hand(model: PeftModel, batch: int = 4, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW(depthmix.param_groups(model, lr=LEARNING_RATE))
    data, losses = rows(), []
    model.train()
    for step in range(steps):
        chunk = data[step * batch : (step + 1) * batch]
        width = max(len(row["input_ids"]) for row in chunk)
        ids = torch.tensor(
            [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in chunk]
        )
        labels = torch.tensor(
            [row["labels"] + [IGNORED] * (width - len(row["labels"])) for row in chunk]
        )
        mask = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in chunk]
        )
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(model: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


# Adam turns a rounding of the gradient into up to a learning rate, 1e-2: a hundredth of that.
def assert_same(a: PeftModel, b: PeftModel, tolerance: float = 1e-4) -> None:
    ours, theirs = trained(a), trained(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    "config",
    [{}, {"distill_weight": 0.0}, {"k": 1}, {"balance_weight": 0.1, "divergence": "js"}],
    ids=str,
)
def test_three_ways_to_train_give_the_same_parameters(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, config: dict[str, Any]
) -> None:
    by_hand, hf, sft = (attached(base, **config) for _ in range(3))
    losses = train_by_hand(by_hand)
    hf_trainer = train_hf(hf, tmp_path / "hf", tokenizer)
    sft_trainer = train_sft(sft, tmp_path / "sft", tokenizer)
    assert_same(by_hand, hf)
    assert_same(by_hand, sft)
    for trainer in (hf_trainer, sft_trainer):
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert logged == pytest.approx(losses, abs=1e-5)
    changed = trained(by_hand)
    before = trained(attached(base, **config))
    assert all(not torch.equal(changed[name], before[name]) for name in changed if "lora_B" in name)


@pytest.mark.parametrize("train", [train_hf, train_sft])
def test_accumulation_of_single_rows_is_one_batch(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, train: Any
) -> None:
    whole, pieces = attached(base), attached(base)
    train(whole, tmp_path / "a", tokenizer)
    train(
        pieces,
        tmp_path / "b",
        tokenizer,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    assert_same(whole, pieces)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("train", [train_hf, train_sft])
def test_gradient_checkpointing_changes_nothing(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, train: Any, reentrant: bool
) -> None:
    plain, checkpointed = attached(base), attached(base)
    train(plain, tmp_path / "a", tokenizer)
    train(
        checkpointed,
        tmp_path / "b",
        tokenizer,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert_same(plain, checkpointed)


@pytest.mark.parametrize("train", [train_hf, train_sft])
def test_resume_gives_the_parameters_of_an_uninterrupted_run(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, train: Any
) -> None:
    whole = attached(base)
    train(whole, tmp_path / "a", tokenizer, save_strategy="steps", save_steps=2)
    resumed = attached(base)
    trainer = type(train(attached(base), tmp_path / "c", tokenizer))
    settings = TrainingArguments if trainer is Trainer else SFTConfig
    keywords: dict[str, Any] = {
        "args": arguments(settings, tmp_path / "b"),
        "train_dataset": Dataset.from_list(rows()),
        "processing_class": tokenizer,
        "optimizer_cls_and_kwargs": optimizer_of(resumed),
    }
    if trainer is Trainer:
        keywords["data_collator"] = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer(resumed, **keywords).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same(whole, resumed, tolerance=0.0)


@pytest.mark.parametrize("train", [train_hf, train_sft])
def test_logs_tell_what_the_router_does(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, train: Any
) -> None:
    seen: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            seen.append(dict(logs))

    model = attached(base)
    settings = TrainingArguments if train is train_hf else SFTConfig
    trainer_class: Any = Trainer if train is train_hf else SFTTrainer
    keywords: dict[str, Any] = {"processing_class": tokenizer, "callbacks": [Tracker()]}
    if train is train_hf:
        keywords["data_collator"] = DataCollatorForSeq2Seq(tokenizer, padding=True)
    trainer = trainer_class(
        model, arguments(settings, tmp_path), train_dataset=Dataset.from_list(rows()), **keywords
    )
    trainer.train()
    for entry in (seen[0], trainer.state.log_history[0]):
        weights = [entry[f"router_weight/layer_{i}"] for i in (1, 2, 3)]
        assert weights == pytest.approx([0.05, 0.05, 0.9], abs=1e-5)
        entropy = -(torch.tensor(weights) * torch.tensor(weights).log()).sum().item()
        assert entry["router_entropy"] == pytest.approx(entropy, abs=1e-5)
        whole = entry["ce_loss"] + depthmix.MoDEConfig().distill_weight * entry["distill_loss"]
        assert entry["loss"] == pytest.approx(whole, abs=1e-5)


def test_router_stands_still_in_its_warm_up(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    weights: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []

    class Watch(TrainerCallback):
        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any
        ) -> None:
            mixture = runtime_of(model).mixture()
            assert mixture is not None
            weights.append(mixture.router.weight.detach().clone())
            norms.append(mixture.norm.scale.detach().clone())

    model = attached(base, router_warmup_steps=2)
    trainer = SFTTrainer(
        model,
        arguments(SFTConfig, tmp_path),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer,
        callbacks=[Watch()],
    )
    trainer.train()
    assert all(not w.any() for w in weights[:2])
    assert all(w.any() for w in weights[2:])
    assert all(n.any() for n in norms)


def test_evaluation_in_training_is_the_cross_entropy_of_the_ensemble(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    losses = []
    for cls, settings in ((Trainer, TrainingArguments), (SFTTrainer, SFTConfig)):
        model = attached(base)
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        trainer = cls(
            model,
            arguments(settings, tmp_path, prediction_loss_only=True, per_device_eval_batch_size=16),
            train_dataset=Dataset.from_list(rows()),
            eval_dataset=Dataset.from_list(rows()),
            processing_class=tokenizer,
            **({"data_collator": collator} if cls is Trainer else {}),
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0] == pytest.approx(train_by_hand(attached(base, distill_weight=0.0), 16, 1)[0])


def test_frozen_mode_is_refused(base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    model = depthmix.attach(copy.deepcopy(base))
    forgotten = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(TrainingError, match="modules_to_save"):
        train_by_hand(forgotten)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"loss_type": "dft"}, "loss_type"), ({"label_smoothing_factor": 0.1}, "label_smoothing")],
)
@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor.*:FutureWarning")
def test_objectives_that_would_leave_mode_out_are_refused(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        train_sft(attached(base), tmp_path, tokenizer, **changes)


def test_trainer_made_before_attach_is_refused(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    model = copy.deepcopy(base)
    trainer = SFTTrainer(
        model,
        arguments(SFTConfig, tmp_path),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer,
        callbacks=[],
    )
    trainer.callback_handler.callbacks = [
        c for c in trainer.callback_handler.callbacks if type(c).__name__ != "RoutingCallback"
    ]
    depthmix.attach(model)
    with pytest.raises(TrainingError, match="before the trainer"):
        trainer.train()


def test_preference_training_runs_on_the_mixture_with_distillation(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    model = attached(base)
    pairs = [
        {"prompt": "w5 w6", "chosen": f" w{i}", "rejected": f" w{i + 1}"} for i in range(7, 15)
    ]
    trainer = DPOTrainer(
        model,
        args=arguments(DPOConfig, tmp_path, max_steps=2),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert trainer.state.log_history[0]["distill_loss"] > 0
    assert any(p.any() for n, p in trained(model).items() if "router" in n)


# --- what a run leaves, and what would be silent


def test_run_that_failed_leaves_nothing_for_the_next(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    """Sums that are no numbers, and a router held in mid-warm-up, are those of one run."""
    model = attached(base, router_warmup_steps=3)
    good = trained(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(math.nan)
    with pytest.raises(TrainingError, match="not a finite number"):
        train_hf(model, tmp_path / "a", tokenizer)
    model.load_state_dict(good, strict=False)
    runtime = runtime_of(model)
    assert runtime.hold_router  # interrupted in mid-warm-up
    with torch.no_grad():
        model(**{name: torch.tensor([rows()[5][name]]) for name in ("input_ids", "labels")})
    trainer = train_hf(model, tmp_path / "b", tokenizer, max_steps=4)
    assert all(math.isfinite(entry.get("ce_loss", 0.0)) for entry in trainer.state.log_history)
    assert not runtime.hold_router


def test_first_figures_are_those_of_the_run_alone(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    """A loop by hand before adds nothing to what the Trainer logs first."""
    first = [train_hf(attached(base), tmp_path / "a", tokenizer).state.log_history[0]]
    model = attached(base)
    batch = {"input_ids": torch.full((1, 9), 5), "labels": torch.full((1, 9), 5)}
    model.train()(**batch).loss.detach()
    first.append(train_hf(model, tmp_path / "b", tokenizer).state.log_history[0])
    assert first[0]["ce_loss"] == pytest.approx(first[1]["ce_loss"], abs=1e-6)


@pytest.mark.filterwarnings("ignore:`compute_loss_func` is deprecated:FutureWarning")
@pytest.mark.parametrize("trainer_class", [Trainer, SFTTrainer])
@pytest.mark.parametrize("weight", [0.1, 0.0])
def test_loss_of_the_users_own(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, weight: float, trainer_class: Any
) -> None:
    """`compute_loss_func` would drop the distillation: refused, unless there is none."""
    model = attached(base, distill_weight=weight, balance_weight=0.0)

    def own_loss(outputs: Any, labels: Any, **_: Any) -> torch.Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())

    settings = TrainingArguments if trainer_class is Trainer else SFTConfig
    trainer = trainer_class(
        model,
        arguments(settings, tmp_path, max_steps=2),
        train_dataset=Dataset.from_list(rows()),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        processing_class=tokenizer,
        compute_loss_func=own_loss,
        optimizer_cls_and_kwargs=optimizer_of(model),
    )
    if weight:
        with pytest.raises(TrainingError, match=r"compute_loss_func.*distill_weight"):
            trainer.train()
    else:
        before = trained(model)
        trainer.train()
        assert all(not torch.equal(p, before[n]) for n, p in trained(model).items())


@pytest.mark.parametrize("read", ["index", "attribute", "number"])
def test_logits_that_were_not_made_say_so(base: LlamaForCausalLM, read: str) -> None:
    ids = torch.tensor([rows()[5]["input_ids"]])
    logits = attached(base).train()(input_ids=ids, labels=ids).logits
    with pytest.raises(TrainingError, match=r"makes no logits.*take `labels` out"):
        {
            "index": lambda: logits[..., :-1, :],
            "attribute": lambda: logits.shape,
            "number": lambda: logits * 2,
        }[read]()


def test_rows_without_a_supervised_token_are_told_of(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, caplog: Any
) -> None:
    model = attached(base)
    masked = [{**row, "labels": [IGNORED] * len(row["labels"])} for row in rows(8)]
    trainer = Trainer(
        model,
        arguments(TrainingArguments, tmp_path, max_steps=1),
        train_dataset=Dataset.from_list(masked),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    )
    logging.enable_propagation()
    try:
        trainer.train()
    finally:
        logging.disable_propagation()
    assert "no token was supervised" in caplog.text
    assert not any(
        "ce_loss" in entry or "router_entropy" in entry for entry in trainer.state.log_history
    )


def test_warm_up_in_a_loop_of_ones_own_says_that_it_does_not_count(
    base: LlamaForCausalLM, caplog: Any
) -> None:
    logging.enable_propagation()
    try:
        train_by_hand(attached(base, router_warmup_steps=2), steps=1)
    finally:
        logging.disable_propagation()
    assert "router_warmup_steps: only a Trainer counts steps" in caplog.text


def test_router_held_by_hand_stands_still(base: LlamaForCausalLM) -> None:
    model = attached(base)
    runtime = runtime_of(model)
    runtime.hold_router = True
    before = trained(model)
    train_by_hand(model, steps=1)
    moved = {n for n, p in trained(model).items() if not torch.equal(p, before[n])}
    assert any("depthmix" in name for name in moved)
    assert not any(".router." in name for name in moved)


@pytest.mark.parametrize("train", [train_hf, train_sft])
def test_one_layer_trains_as_plain_lora(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, train: Any
) -> None:
    """With k = 1 the loss is the fused one, of the supervised tokens alone, and the same."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = get_peft_model(copy.deepcopy(base), config)
    model = attached(base, k=1)
    model.load_state_dict(plain.state_dict())
    shapes: list[tuple[int, ...]] = []
    model.get_base_model().lm_head.register_forward_hook(
        lambda _m, args, _out: shapes.append(tuple(args[0].shape[:2]))
    )
    logs = [train(m, tmp_path, tokenizer).state.log_history[:4] for m in (plain, model)]
    for own, ours in zip(*logs, strict=True):
        assert ours["loss"] == pytest.approx(own["loss"], abs=1e-5)
        assert not any("router" in name or name == "ce_loss" for name in ours)
    assert_same(plain, model)
    assert {length for _, length in shapes} <= {1}  # no logits are made


@pytest.mark.parametrize("train", [train_hf, train_sft])
def test_evaluation_logs_the_distillation(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, train: Any
) -> None:
    """`eval_loss` is the cross-entropy; what training adds to it is logged beside it.

    Before the first step, on the rows of that step: the figures must be those of the step.
    """
    trainer = train(
        attached(base),
        tmp_path,
        tokenizer,
        {"eval_dataset": Dataset.from_list(rows())},
        **{"max_steps": 1, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16},
        **{"eval_strategy": "steps", "eval_steps": 9, "eval_on_start": True},
    )
    entry, whole = trainer.state.log_history[:2]
    assert entry["eval_loss"] == pytest.approx(whole["ce_loss"], abs=1e-4)
    assert entry["eval_distill_loss"] == pytest.approx(whole["distill_loss"], abs=1e-4)
    assert entry["eval_router_entropy"] == pytest.approx(whole["router_entropy"], abs=1e-4)
    assert "eval_ce_loss" not in entry


@pytest.mark.parametrize("train", [train_hf, train_sft])
def test_evaluation_changes_nothing_of_the_training(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, train: Any
) -> None:
    alone, watched = attached(base), attached(base)
    train(alone, tmp_path / "a", tokenizer)
    held_out = {"eval_dataset": Dataset.from_list(rows())}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1}
    train(watched, tmp_path / "b", tokenizer, held_out, **evaluation)
    assert_same(alone, watched, tolerance=0.0)


def test_evaluation_draws_no_random_number(base: LlamaForCausalLM) -> None:
    model = attached(base, distill_fraction=0.25)
    runtime = runtime_of(model)
    runtime.trainer = "plain"
    ids, before = torch.tensor([rows()[5]["input_ids"]]), torch.get_rng_state()
    model.eval()(input_ids=ids, labels=ids)
    sums = runtime.evaluation.take()
    assert sums is not None
    assert sums[0] == -(-(ids.numel() - 1) // 4)  # every fourth token
    assert torch.equal(torch.get_rng_state(), before)
