"""Whether the router of an encoder means anything: right and wrong answers, kinds of questions.

    python experiments/routing_encoder.py --model FOLDER --train ARC-Easy_train.json \\
        --test ARC-Easy_test.json --output docs/results/routing-encoder.json

LoRA + MoDE is trained as in classifier.py, once a seed, at the rate that was chosen there. A gate
weighs the pooled states of a (question, answer) pair; right and wrong answers are compared within
their question, kinds of questions between them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding

import depthmix
from classifier import VALIDATION, pairs, questions, tuned
from depthmix.analysis.routing import differences, grouped_by
from depthmix.files import write_text
from routing import show

RATE = 1e-3
WORDS = ("what", "which", "how", "why", "where", "when", "who")
LONG = 16  # words of a question, the median


def main() -> None:
    """Train and look, a seed at a time; print what the seeds have in common."""
    parser = argparse.ArgumentParser(description="Compare the routing of an encoder over seeds.")
    parser.add_argument("--model", required=True, help="folder or hub name of an encoder")
    parser.add_argument("--train", type=Path, required=True, help="questions to learn from")
    parser.add_argument("--test", type=Path, required=True, help="questions to look at")
    parser.add_argument("--most", type=int, default=500, help="of the latter (default: 500)")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--out", type=Path, default=Path("classifier"), help="folder of the trainer"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = pairs(tokenizer, questions(options.train)[VALIDATION:])
    asked = questions(options.test)[: options.most]
    runs = []
    for seed in options.seeds:
        model, _, _ = tuned(options, True, RATE, seed, rows)
        runs.append({"task": "ARC-Easy", "seed": seed, **looked_at(model, tokenizer, asked)})
        write_text(options.output, json.dumps(runs, indent=1))
    show(runs)


@torch.no_grad()
def looked_at(model: Any, tokenizer: Any, asked: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the router does on questions."""
    rows = pairs(tokenizer, list(asked))
    collate = DataCollatorWithPadding(tokenizer)
    with depthmix.routing(model) as record:
        for start in range(0, len(rows), 64):
            model(**collate(rows[start : start + 64]))
    gate = torch.cat(record.gates).double().numpy()
    question = np.repeat(np.arange(len(asked)), [len(item["answers"]) for item in asked])
    words = [item["question"].lower().split() for item in asked]
    groups = [
        grouped_by("answer", ["right" if row["labels"] else "wrong" for row in rows]),
        grouped_by("question", [_kind(words[at]) for at in question], of_rows=True),
        grouped_by("length", [_length(words[at]) for at in question], of_rows=True),
    ]
    entropy = -(gate * np.log(gate.clip(1e-30))).sum(axis=1).mean()
    return {
        "layers": list(record.layers),
        "weights": gate.mean(axis=0).tolist(),
        "entropy": float(entropy),
        "differences": [vars(line) for line in differences(gate, question, groups)],
    }


def _kind(words: Sequence[str]) -> str:
    return next((word for word in words if word in WORDS), "other")


def _length(words: Sequence[str]) -> str:
    return "long" if len(words) > LONG else "short"


if __name__ == "__main__":
    main()
