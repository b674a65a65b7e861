"""Answer multiple-choice questions with an encoder that classifies (question, answer) pairs.

    python experiments/classifier.py --model FOLDER --train ARC-Easy_train.json \\
        --test ARC-Easy_test.json

LoRA, with and without MoDE. Each pair is right or wrong; of a question's answers the one with the
best score counts. Learning rates are chosen on 250 questions of the training file, then each method
runs once a seed on the test file. The model: a folder, or a name on the hub, of an encoder.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import depthmix
from depthmix.compare.bootstrap import paired_interval

RATES = (5e-4, 1e-3, 2e-3)
VALIDATION = 250


def questions(path: Path) -> list[dict[str, Any]]:
    """Read LLM-Adapters rows: the question, its answers, and the index of the right one."""
    read = []
    for row in json.loads(path.read_text("utf-8")):
        stem, _, listed = row["instruction"].partition("\n\n")
        listed = listed.partition("\n\nAnswer format")[0]
        answers = [part.strip() for part in re.split(r"Answer\d: ", listed)[1:]]
        right = int(row["answer"].removeprefix("answer")) - 1
        read.append({"question": stem.partition(": ")[2], "answers": answers, "right": right})
    return read


def pairs(tokenizer: Any, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one encoded row for each answer of each question, labelled right (1) or wrong (0)."""
    rows = []
    for item in asked:
        for number, answer in enumerate(item["answers"]):
            encoded = tokenizer(item["question"], answer, truncation=True, max_length=96)
            rows.append({**encoded, "labels": int(number == item["right"])})
    return rows


def tuned(options: argparse.Namespace, mode: bool, rate: float, seed: int, rows: list[Any]) -> Any:
    """Train one model; return it with the seconds that it took."""
    set_seed(seed)
    base = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="SEQ_CLS")
    config = depthmix.MoDEConfig(k=3 if mode else 1)
    model = depthmix.attach(base, config, lora)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    arguments = TrainingArguments(
        output_dir=str(options.out),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=32,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=seed,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    groups = depthmix.param_groups(model, lr=rate)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "lr": rate}),
    )
    start = time.perf_counter()
    trainer.train()
    return model.eval(), time.perf_counter() - start, trainer.state.log_history


@torch.no_grad()
def answered(model: Any, tokenizer: Any, asked: list[dict[str, Any]]) -> list[float]:
    """Return for each question whether the answer with the best score is the right one."""
    rows = pairs(tokenizer, asked)
    collate = DataCollatorWithPadding(tokenizer)
    scores: list[Tensor] = []
    for start in range(0, len(rows), 64):
        logits = model(**collate(rows[start : start + 64])).logits
        scores += (logits[:, 1] - logits[:, 0]).unbind()
    right, place = [], 0
    for item in asked:
        own = torch.stack(scores[place : place + len(item["answers"])])
        place += len(item["answers"])
        right.append(float(own.argmax().item() == item["right"]))
    return right


def main() -> None:
    """Choose the rates, run the seeds, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, default=Path("classifier"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train = questions(options.train)
    fitted, held_out = train[VALIDATION:], train[:VALIDATION]
    test = questions(options.test)
    rows = pairs(tokenizer, fitted)
    results: dict[str, Any] = {"validation": {}, "test": {}}
    right: dict[str, list[list[float]]] = {}
    for name, mode in (("lora", False), ("lora+mode", True)):
        found = {}
        for rate in RATES:
            model, _, _ = tuned(options, mode, rate, 100, rows)
            found[rate] = statistics.mean(answered(model, tokenizer, held_out))
            print(f"{name} at {rate}: {found[rate]:.3f} on validation questions", flush=True)
        best = max(found, key=lambda rate: found[rate])
        results["validation"][name] = {str(rate): value for rate, value in found.items()}
        right[name] = []
        for seed in options.seeds:
            model, seconds, log = tuned(options, mode, best, seed, rows)
            right[name].append(answered(model, tokenizer, test))
            accuracy = statistics.mean(right[name][-1])
            routing = [entry for entry in log if "router_entropy" in entry][-1:]
            run = {"rate": best, "accuracy": accuracy, "seconds": seconds, "log": routing}
            results["test"].setdefault(name, {})[seed] = run
            print(f"{name} at {best}, seed {seed}: {run}", flush=True)
    better = np.array(right["lora+mode"]) - np.array(right["lora"])
    results["difference"] = paired_interval(better, np.ones(len(test)))
    mean, low, high = results["difference"]
    print(f"accuracy of LoRA + MoDE less LoRA's: {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "classifier.json").write_text(json.dumps(results, indent=1), "utf-8")


if __name__ == "__main__":
    main()
