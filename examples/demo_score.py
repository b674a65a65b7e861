"""Score a model on the demo's test rows: accuracy, held-out loss and what the router did.

It runs in a process of its own, so that a tuned model is what `depthmix.load` finds on disk.

    python examples/demo_score.py --model NAME --adapter FOLDER --data test.jsonl --output out.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftModel
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import depthmix
from demo_task import TASKS, Row, Task, read_rows
from depthmix.analysis.layers import encode, score_rows
from depthmix.model.runtime import runtime_of

T = TypeVar("T")

PICTURED = 6  # questions whose routing is kept token by token
NEW_TOKENS = 24  # more than any right answer has


@dataclass(frozen=True)
class Scorer:
    """A model in evaluation mode, and whether MoDE is attached to it."""

    model: Any
    tokenizer: Any
    has_mode: bool
    batch: int

    def score(self, task: Task, rows: list[Row]) -> Row:
        """Return the model's figures and replies on test rows."""
        begin = time.perf_counter()
        replies = self.generate([row["prompt"] for row in rows])
        marks = [task.correct(r, row["entry"]) for r, row in zip(replies, rows, strict=True)]
        accuracy = sum(marks) / len(marks)
        return {
            "questions": len(rows),
            "accuracy": accuracy,
            "standard_error": math.sqrt(accuracy * (1 - accuracy) / len(marks)),
            **self.held_out(rows),
            "seconds": time.perf_counter() - begin,
            "pictured": [
                self.picture(row["prompt"], reply)
                for row, reply in zip(rows[:PICTURED], replies, strict=False)
                if self.has_mode
            ],
            "replies": [
                {"prompt": row["prompt"], "right": row["completion"], "reply": reply, "mark": mark}
                for row, reply, mark in zip(rows, replies, marks, strict=True)
            ],
        }

    @torch.no_grad()
    def generate(self, prompts: Sequence[str]) -> list[str]:
        """Return greedy replies; prompts are padded on the left, so that all end together."""
        replies: list[str] = []
        for part in _batches(prompts, self.batch, "answers"):
            inputs = self.tokenizer(part, return_tensors="pt", padding=True, padding_side="left")
            inputs = inputs.to(self.model.device)
            output = self.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            new = output[:, inputs["input_ids"].shape[1] :]
            replies += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return replies

    def held_out(self, rows: list[Row]) -> Row:
        """Return the loss per completion token and, with MoDE, the mean gate there."""
        scores = score_rows(self.model, self.tokenizer, rows, self.batch)
        figures: Row = {"loss": scores.mean_loss}
        if self.has_mode:
            layers = runtime_of(self.model).anatomy.layer_indices
            figures |= {"layers": list(layers), "gate": scores.gate}
        return figures

    @torch.no_grad()
    def picture(self, prompt: str, reply: str) -> Row:
        """Return the tokens of the model's own reply, each with the gate that predicted it."""
        ids, start = encode({"prompt": prompt, "completion": reply}, self.tokenizer)
        inputs = torch.tensor([ids], device=self.model.device)
        with depthmix.routing(self.model) as record:
            self.model(input_ids=inputs)
        return {
            "prompt": prompt,
            "tokens": [self.tokenizer.decode(token) for token in ids[start:]],
            "gates": record.gates[0][0, start - 1 : -1].tolist(),
        }


def load_scorer(name: str, adapter: Path | None, has_mode: bool, batch: int) -> Scorer:
    """Load the base model or, given an adapter, the tuned one."""
    model: Any = AutoModelForCausalLM.from_pretrained(name)
    if adapter and has_mode:
        model = depthmix.load(model, adapter)
    elif adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return Scorer(model.to(device).eval(), tokenizer, has_mode and adapter is not None, batch)


def _batches(items: Sequence[T], size: int, title: str) -> Iterator[list[T]]:
    for start in track(range(0, len(items), size), description=f"  {title}"):
        yield list(items[start : start + size])


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Score one model on the demo's test rows.")
    parser.add_argument("--model", required=True, help="base model: a folder or a hub name")
    parser.add_argument("--adapter", type=Path, help="folder of the tuned adapter (default: none)")
    parser.add_argument("--no-mode", action="store_true", help="the adapter is without MoDE")
    parser.add_argument("--task", choices=TASKS, default="sums", help="what the rows are made of")
    parser.add_argument("--data", type=Path, required=True, help="test rows, as JSON lines")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--batch-size", type=int, default=25, help="questions in one batch")
    return parser.parse_args()


def main() -> None:
    """Score and write the result."""
    options = parse()
    logging.disable_progress_bar()
    # PEFT asks for a property of transformers by its old name, at every model.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    scorer = load_scorer(options.model, options.adapter, not options.no_mode, options.batch_size)
    result = scorer.score(TASKS[options.task], read_rows(options.data))
    options.output.write_text(json.dumps(result, indent=1), "utf-8")


if __name__ == "__main__":
    main()
