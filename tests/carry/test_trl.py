"""TRL's trainers: what each makes of MoDE; and SFTTrainer's ways to lay out its rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import depthmix
from depthmix.errors import TrainingError
from models import ANATOMIES, randomise, tiny_model, word_tokenizer

K = 3
CHAT = (
    "{% for m in messages %}<s> {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }} </s> {% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return tiny_model("llama")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(chat_template=CHAT)


def attached(base: Any, task_type: str = "CAUSAL_LM", **changes: Any) -> PeftModel:
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type=task_type)
    config = depthmix.MoDEConfig(**({"k": K, "distill_fraction": 1.0} | changes))
    return depthmix.attach(copy.deepcopy(base), config, lora)  # type: ignore[no-any-return]


def arguments(cls: type, folder: Path, **changes: Any) -> Any:
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
    }
    return cls(**(values | changes))


def logged(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def moved(model: PeftModel) -> bool:
    """Tell whether the router has learned: it starts at zero."""
    return all(
        bool(p.any()) for n, p in model.named_parameters() if "router" in n and p.requires_grad
    )


TEXTS = [{"text": " ".join(f"w{4 + (i * j) % 90}" for j in range(2, 5 + i % 5))} for i in range(12)]
PAIRS = [{"prompt": f"w{i} w6", "completion": f" w{i + 1} w{i + 2}"} for i in range(7, 19)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"w{i} w5"},
            {"role": "assistant", "content": f"w{i + 1}"},
        ]
    }
    for i in range(7, 19)
]


@pytest.mark.parametrize(
    ("rows", "changes", "supervised"),
    [
        (TEXTS, {}, None),
        (TEXTS, {"packing": True, "max_length": 16}, None),
        (TEXTS, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}, None),
        (PAIRS, {"completion_only_loss": True}, 3),
        (CHATS, {"assistant_only_loss": True}, 2),
    ],
    ids=["text", "packing", "wrapped", "completion", "assistant"],
)
@pytest.mark.filterwarnings("ignore:.*[Pp]adding-free.*", "ignore:.*packing.*")
def test_layouts_of_rows(
    base: LlamaForCausalLM,
    tokenizer: Any,
    tmp_path: Path,
    rows: list[dict[str, Any]],
    changes: dict[str, Any],
    supervised: int | None,
) -> None:
    """The loss is the one of plain MoDE on the batches that the trainer makes."""
    trainer = SFTTrainer(
        attached(base),
        arguments(SFTConfig, tmp_path, max_steps=1, learning_rate=0.0, **changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batches: list[dict[str, Any]] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda features: batches.append(collate(features)) or batches[-1]
    trainer.train()
    batch = batches[0]
    by_hand = attached(base).train()
    # As the trainer does; with a cache, transformers does not look for packed rows.
    expected = by_hand(**batch, use_cache=False).loss.item()
    assert logged(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-4)
    if supervised is not None:
        assert (batch["labels"] != -100).sum() == supervised * len(batch["labels"])


@pytest.mark.filterwarnings("ignore:`loss_type='chunked_nll'`:FutureWarning")
@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
def test_losses_of_sft(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, loss_type: str
) -> None:
    """TRL computes both in chunks; MoDE's loss, which does too, takes the place of either."""
    trainer = SFTTrainer(
        attached(base),
        arguments(SFTConfig, tmp_path, loss_type=loss_type),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    trainer.train()
    assert {"ce_loss", "distill_loss", "router_entropy"} <= set(logged(trainer)[0])


def test_group_relative_policy_optimisation(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path
) -> None:
    """Replies are generated by the mixture and scored by it."""

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) + 0.1 * i for i, text in enumerate(completions)]

    model = attached(base)
    trainer = GRPOTrainer(
        model,
        reward_funcs=reward,
        args=arguments(
            GRPOConfig, tmp_path, num_generations=4, max_completion_length=6, temperature=1.0
        ),
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w6"} for i in range(7, 15)]),
        processing_class=tokenizer,
    )
    trainer.train()
    assert moved(model)
    assert logged(trainer)[0]["distill_loss"] > 0


def reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) + 0.1 * i for i, text in enumerate(completions)]


def trained_by(name: str, model: Any, tokenizer: Any, folder: Path) -> list[dict[str, float]]:
    """Train two steps by one of TRL's trainers; return what it logs."""
    data = {
        "dpo": [{"prompt": "w5 w6", "chosen": f" w{i}", "rejected": f" w{i + 1}"} for i in PLACES],
        "kto": [{"prompt": "w5 w6", "completion": f" w{i}", "label": bool(i % 2)} for i in PLACES],
        "grpo": [{"prompt": f"w{i} w6"} for i in PLACES],
        "rloo": [{"prompt": f"w{i} w6"} for i in PLACES],
    }[name]
    sampling = {"num_generations": 4, "max_completion_length": 6, "temperature": 0.7}
    trainer_class, config, further = {
        "dpo": (DPOTrainer, DPOConfig, {}),
        "kto": (KTOTrainer, KTOConfig, {}),
        "grpo": (GRPOTrainer, GRPOConfig, sampling),
        "rloo": (RLOOTrainer, RLOOConfig, sampling),
    }[name]
    trainer = trainer_class(
        model,
        args=arguments(config, folder, max_steps=2, **further),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        **({"reward_funcs": reward} if further else {}),
    )
    trainer.train()
    return logged(trainer)


PLACES = range(7, 15)


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo", "rloo"])
def test_last_layer_alone_trains_as_without_mode(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, name: str
) -> None:
    """One-hot gate, no distillation: the trainer's own figures and parameters, at a temperature."""
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = get_peft_model(copy.deepcopy(base), lora)
    mode = depthmix.MoDEConfig(adaptation="none", distill_weight=0.0, router_prior=None)
    model = depthmix.attach(copy.deepcopy(base), mode, lora)
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        model.get_base_model().depthmix.modules_to_save["default"].router.bias[-1] = 1e4
    own = trained_by(name, plain, tokenizer, tmp_path / "plain")
    ours = trained_by(name, model, tokenizer, tmp_path / "mode")
    for entry, wanted in zip(ours, own, strict=True):
        for figure in wanted.keys() & entry.keys() - TIMES:
            assert entry[figure] == pytest.approx(wanted[figure], abs=1e-4, nan_ok=True), figure
    for n, p in plain.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(model.get_parameter(n), p, rtol=0, atol=1e-4, msg=n)


TIMES = {
    "step_time",
    "epoch",
    "train_runtime",
    "train_samples_per_second",
    "train_steps_per_second",
}


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo", "rloo"])
@pytest.mark.parametrize("signed", [False, True])
def test_distillation_in_every_trainer(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, name: str, signed: bool
) -> None:
    model = attached(base, distill_signed=signed, distill_weight=1.0)
    entries = trained_by(name, model, tokenizer, tmp_path)
    assert all(entry["distill_loss"] > 0 for entry in entries[:2])
    assert moved(model)


@pytest.mark.parametrize("option", ["entropy_coef", "cast_lm_head_to_fp32"])
def test_what_the_fused_loss_does_not_do_is_refused(
    base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path, option: str
) -> None:
    trainer = GRPOTrainer(
        attached(base),
        reward_funcs=reward,
        args=arguments(
            GRPOConfig, tmp_path, num_generations=4, max_completion_length=4, **{option: 1}
        ),
        train_dataset=Dataset.from_list([{"prompt": f"w{i} w6"} for i in PLACES]),
        processing_class=tokenizer,
    )
    with pytest.raises(TrainingError, match=option):
        trainer.train()


def test_preferences_without_pairs(base: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    model = attached(base)
    rows = [{"prompt": "w5 w6", "completion": f" w{i}", "label": bool(i % 2)} for i in range(7, 15)]
    trainer = KTOTrainer(
        model,
        args=arguments(KTOConfig, tmp_path),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    assert moved(model)


def test_reward_model(tokenizer: Any, tmp_path: Path) -> None:
    """A classifier with one output; the trainer makes its loss of the mixture's scores."""
    anatomy = ANATOMIES["llama"]
    torch.manual_seed(0)
    config = anatomy.config(**anatomy.options, num_labels=1)
    model = attached(randomise(LlamaForSequenceClassification(config)), "SEQ_CLS")
    pairs = [{"chosen": f"w{i} w6", "rejected": f"w{i} w7"} for i in range(8, 20)]
    trainer = RewardTrainer(
        model,
        args=arguments(RewardConfig, tmp_path, max_steps=12),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in logged(trainer)]
    assert losses[-1] < losses[0]
    assert moved(model)
