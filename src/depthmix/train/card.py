"""The model card of a run on a local base, of which TRL writes "fine-tuned version of [None]"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_UNNAMED = "[None](https://huggingface.co/None)"


class BaseNamed(TrainerCallback):
    """Names the base model in the card that TRL writes with every checkpoint."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name it, so that a run that is stopped has a card without gaps."""
        if state.is_world_process_zero:
            name_base(Path(str(args.output_dir)), str(kwargs["model"].config.name_or_path))


def name_base(folder: Path, base: str) -> None:
    """Name the base model in the card in `folder`, if there is a card that does not."""
    path = folder / "README.md"
    if not path.exists():
        return
    text = path.read_text("utf-8")
    if _UNNAMED in text:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text.replace(_UNNAMED, f"`{Path(base).name}`, a local model"), "utf-8")
        temporary.replace(path)
