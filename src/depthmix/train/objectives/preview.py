"""`--preview` of pairs of answers, and of prompts with what would be rewarded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from depthmix.data.conversation import renderer
from depthmix.data.fields import Row, common_length
from depthmix.train.arguments import TrainArguments
from depthmix.train.objectives.prepare import prepare
from depthmix.train.objectives.rewards import carried, rewards_of

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase


def show_pairs(arguments: TrainArguments, console: Console) -> None:
    """Print the first pairs as the model gets them, and counts of all."""
    data = prepare(arguments)
    tokenizer = data.tokenizer
    texts = [_pair(row, tokenizer) for row in data.train]
    counts = [[len(_ids(text, tokenizer)) for text in pair] for pair in texts]
    for number, (prompt, chosen, rejected) in enumerate(texts[: arguments.run.preview], 1):
        lengths = counts[number - 1]
        console.print(
            f"row {number}: {lengths[0]:,} tokens of prompt, {lengths[1]:,} chosen, "
            f"{lengths[2]:,} rejected",
            style="dim",
        )
        for title, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
            console.print(f"{title}: {text}", markup=False)
        console.print()
    limit = arguments.training.max_length
    longest = [prompt + max(answers) for prompt, *answers in counts]
    console.print(f"rows: {len(texts):,} of format {data.format}")
    console.print(f"tokens of prompt and longer answer: {spread_of(longest)}")
    if limit is not None:
        cut = sum(length > limit for length in longest)
        dropped = sum(prompt >= limit for prompt, *_ in counts)
        console.print(f"max_length {limit}: {cut - dropped:,} rows cut, {dropped:,} left out")


def show_prompts(arguments: TrainArguments, console: Console) -> None:
    """Print the first prompts as the model gets them, with what would be rewarded."""
    data = prepare(arguments)
    training, rewards = arguments.training, rewards_of(arguments.run)
    assert data.prompts is not None
    for number, ids in enumerate(data.prompts[: arguments.run.preview], 1):
        row = data.train[number - 1]
        console.print(f"row {number}: {len(ids):,} tokens", style="dim")
        console.print(data.tokenizer.decode(ids, skip_special_tokens=False), markup=False)
        for reward in rewards:
            wanted = reward.wanted({n: json.loads(row[carried(n)]) for n in reward.columns})
            console.print(f"rewarded by {reward.name}: {wanted}", markup=False)
        console.print()
    step = training.generation_batch_size // training.num_generations
    console.print(f"rows: {len(data.prompts):,} of format {data.format}")
    console.print(f"tokens a prompt: {spread_of(list(map(len, data.prompts)))}")
    console.print(
        f"answers: {training.num_generations} a prompt, of up to "
        f"{training.max_completion_length} tokens, to {step} prompts at a time"
    )


def spread_of(lengths: Sequence[int] | Any) -> str:
    """Return quantiles of lengths in words."""
    import numpy as np

    quantiles = np.percentile(lengths, [0, 50, 90, 99, 100], method="higher")
    names = ("min", "median", "90 %", "99 %", "max")
    return ", ".join(f"{name} {int(n):,}" for name, n in zip(names, quantiles, strict=True))


def _pair(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Return prompt, chosen and rejected answer with their end, as text."""
    if isinstance(row["prompt"], str):
        end = str(tokenizer.eos_token)
        answers = [row[name].removesuffix(end) + end for name in ("chosen", "rejected")]
        return row["prompt"], answers[0], answers[1]
    render = renderer(tokenizer, row.get("tools"), row.get("chat_template_kwargs"))
    prompt = render(row["prompt"], True)
    wholes = [render([*row["prompt"], *row[name]], False) for name in ("chosen", "rejected")]
    start = min(common_length(prompt, whole) for whole in wholes)
    return prompt[:start], wholes[0][start:], wholes[1][start:]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
