"""Unmodified trainers, and a hand-written loop, give the same parameters on the same data."""

from __future__ import annotations

import copy
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


def train_hf(model: PeftModel, folder: Path, tokenizer: Any, **changes: Any) -> Trainer:
    trainer = Trainer(
        model,
        arguments(TrainingArguments, folder, **changes),
        train_dataset=Dataset.from_list(rows()),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        optimizer_cls_and_kwargs=optimizer_of(model),
    )
    trainer.train()
    return trainer


def train_sft(model: PeftModel, folder: Path, tokenizer: Any, **changes: Any) -> SFTTrainer:
    trainer = SFTTrainer(
        model,
        arguments(SFTConfig, folder, **changes),
        train_dataset=Dataset.from_list(rows()),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_of(model),
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


def test_preference_training_runs_on_the_mixture_without_distillation(
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
    assert "distill_loss" not in trainer.state.log_history[0]
    assert any(p.any() for n, p in trained(model).items() if "router" in n)
