"""Tools around a model with MoDE: pipelines, every way to generate, precision, trackers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    EarlyStoppingCallback,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    pipeline,
)

import depthmix
from command_fixtures import build_tokenizer
from models import attached, choose_last_layer, tiny_model, token_ids

IDS = token_ids()
MASK = torch.ones_like(IDS)
NEW = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return tiny_model("llama")  # type: ignore[return-value]


@pytest.fixture
def model(base: LlamaForCausalLM) -> LlamaForCausalLM:
    torch.manual_seed(2)
    return attached(base, k=3)  # type: ignore[return-value]


def generated(model: Any, **options: Any) -> torch.Tensor:
    torch.manual_seed(5)
    return model.generate(IDS, attention_mask=MASK, **NEW, **options)  # type: ignore[no-any-return]


def by_hand(model: Any) -> torch.Tensor:
    """Greedy decoding without a cache, one whole forward a token."""
    ids = IDS
    with torch.no_grad():
        for _ in range(NEW["max_new_tokens"]):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1].clone()
            logits[:, 2] = -float("inf")  # end of sequence, which min_new_tokens forbids
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_ways_to_decode_greedily(model: LlamaForCausalLM, options: dict[str, Any]) -> None:
    # Prompt lookup checks drafts one row at a time.
    rows = slice(0, 1) if "prompt_lookup_num_tokens" in options else slice(None)
    torch.manual_seed(5)
    found = model.generate(IDS[rows], attention_mask=MASK[rows], do_sample=False, **NEW, **options)
    assert torch.equal(found, by_hand(model)[rows])


def test_assistant_drafts_and_mode_decides(model: LlamaForCausalLM, base: LlamaForCausalLM) -> None:
    torch.manual_seed(9)
    assistant = tiny_model("llama", num_hidden_layers=2)
    assistant.generation_config.num_assistant_tokens = 3
    found = model.generate(
        IDS[:1], attention_mask=MASK[:1], do_sample=False, assistant_model=assistant, **NEW
    )
    assert torch.equal(found, by_hand(model)[:1])


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
        {"num_beams": 3, "do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_one_hot_router_generates_as_the_base_model_does(
    base: LlamaForCausalLM, options: dict[str, Any]
) -> None:
    model = attached(base, perturbed=False, k=3)
    choose_last_layer(model.depthmix)
    assert torch.equal(generated(model, **options), generated(base, **options))


def test_pipeline(model: LlamaForCausalLM) -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    wide = attached(tiny_model("llama", vocab_size=len(tokenizer)), k=3)
    generate = pipeline("text-generation", model=wide, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    for prompt in ("What is 3 + 4?", chat):
        texts = [
            generate(prompt, max_new_tokens=6, do_sample=False)[0]["generated_text"]
            for _ in range(2)
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """Loss and gradients under autocast are those of full precision, to the dtype's rounding."""
    model.train()
    exact = model(input_ids=IDS, labels=IDS).loss
    with torch.autocast("cpu", dtype=dtype):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.03, atol=0.03)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.depthmix.parameters())


def test_device_map(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """A model that accelerate has dispatched: hooks of both live side by side."""
    base.save_pretrained(tmp_path)
    mapped = LlamaForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    model, plain = attached(base, perturbed=False, k=3), attached(mapped, perturbed=False, k=3)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(values | changes))


def lora_with_mode(base: LlamaForCausalLM) -> Any:
    torch.manual_seed(3)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return depthmix.attach(copy.deepcopy(base), depthmix.MoDEConfig(k=3), lora)


ROWS = Dataset.from_list([{"input_ids": row, "labels": row} for row in IDS.tolist() * 4])


def test_noise_on_the_embeddings(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """NEFTune adds noise in training and takes it off at the end."""
    losses = []
    for alpha in (None, 5.0):
        model = lora_with_mode(base)
        trainer = Trainer(model, arguments(tmp_path, neftune_noise_alpha=alpha), train_dataset=ROWS)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        assert "router_entropy" in trainer.state.log_history[0]
    assert losses[0] != losses[1]
    with torch.no_grad():
        logits = model.eval()(input_ids=IDS).logits
        assert torch.equal(logits, model(input_ids=IDS).logits)


def test_early_stopping_brings_the_best_model_back(base: LlamaForCausalLM, tmp_path: Path) -> None:
    """Rows of other tokens get worse: the first checkpoint is the best, MoDE's part included."""
    model = lora_with_mode(base)
    groups = depthmix.param_groups(model, lr=2e-2)
    others = (IDS % 20 + 60).tolist()
    options = {
        **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
        **{"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 20},
        "greater_is_better": False,
    }
    trainer = Trainer(
        model,
        arguments(tmp_path, **options),
        train_dataset=Dataset.from_list(
            [{"input_ids": row, "labels": row} for row in (IDS % 20 + 20).tolist()]
        ),
        eval_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in others]),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "lr": 2e-2}),
    )
    trainer.train()
    evaluated = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    assert trainer.state.global_step < 20
    assert min(evaluated) < evaluated[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evaluated), rel=1e-5)
