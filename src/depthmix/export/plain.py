"""Plain weights, which every engine loads: without the mixture, or with it distilled into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from depthmix.data.batches import cut, padded, targets
from depthmix.data.tokens import IGNORED
from depthmix.errors import TrainingError
from depthmix.export.folder import merged
from depthmix.files import whole_folder

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """What a model gives on held-out rows, beside the mixture.

    Attributes:
        loss: cross-entropy a supervised token, in nats.
        accuracy: share of the supervised tokens that are the likeliest.
        agreement: share of them at which the likeliest token is the mixture's.
    """

    loss: float
    accuracy: float
    agreement: float


def distil(
    student: nn.Module, teacher: nn.Module, batches: Sequence[Batch], learning_rate: float
) -> None:
    """Tune what is trainable of a model towards what another one predicts, a step a batch.

    The loss is the divergence (KL) of the student from the teacher on the supervised tokens; the
    rate falls to zero in a straight line.

    Args:
        student: without MoDE, in training mode for the while.
        teacher: with MoDE.
        batches: `input_ids`, `attention_mask`, and `labels` of the supervised tokens.
        learning_rate: of AdamW, at the start.

    Raises:
        TrainingError: nothing of the student is trainable.
    """
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if not trainable:
        raise TrainingError("nothing of the model is trainable: the mixture can be left out only")
    optimiser = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=len(batches))
    student.train()
    for batch in tqdm(batches, desc="distilling", unit="step"):
        with torch.no_grad():
            wanted, _ = _predicted(teacher, batch)
        found, _ = _predicted(student, batch)
        divergence = F.kl_div(
            found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        divergence.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        falling.step()
        optimiser.zero_grad()
    student.eval()


@torch.no_grad()
def cost(model: nn.Module, teacher: nn.Module, batches: Iterable[Batch]) -> Cost:
    """Return what a model gives on rows, in evaluation mode."""
    totals, tokens = torch.zeros(3, dtype=torch.float64), 0
    for batch in batches:
        wanted, _ = _predicted(teacher, batch)
        found, labels = _predicted(model, batch)
        likeliest = found.argmax(-1)
        parts = (
            F.cross_entropy(found, labels, reduction="sum"),
            (likeliest == labels).sum(),
            (likeliest == wanted.argmax(-1)).sum(),
        )
        totals += torch.stack([part.double().cpu() for part in parts])
        tokens += len(labels)
    return Cost(*(totals / max(tokens, 1)).tolist())


def write_plain(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a model without MoDE, its tuning method merged, as `save_pretrained` does.

    Raises:
        ConfigError: the folder holds something.
        DepthmixError: the tuning method cannot be merged.
    """
    with whole_folder(folder) as staging:
        merged(model).save_pretrained(staging)
        tokenizer.save_pretrained(staging)


def batches_of(rows: Any, size: int, longest: int, device: torch.device) -> Iterator[Batch]:
    """Pad tokenised rows, cut to `longest` tokens, into batches."""
    for start in range(0, len(rows), size):
        chosen = rows.select(range(start, min(start + size, len(rows))))
        yield padded([cut(row, longest) for row in chosen], device)


def _predicted(model: nn.Module, batch: Batch) -> tuple[Float[Tensor, "n v"], Int[Tensor, " n"]]:
    """Return the logits of the supervised tokens, and these."""
    labels = targets(batch["labels"])
    supervised = labels != IGNORED
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits[supervised].float(), labels[supervised]
