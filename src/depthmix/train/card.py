"""The gaps in TRL's model card: None for a base in a folder, and for a run without a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_NO_BASE, _NO_NAME = "[None](https://huggingface.co/None)", 'model="None"'


class CardFilled(TrainerCallback):
    """Fills the card that TRL writes with every checkpoint."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Fill it, so that a run that is stopped has a card without gaps."""
        if state.is_world_process_zero:
            fill_card(Path(str(args.output_dir)), str(kwargs["model"].config.name_or_path))


def fill_card(folder: Path, base: str) -> None:
    """Name base model and run in the card in `folder`, if there is a card that does not."""
    path = folder / "README.md"
    if not path.exists():
        return
    text = path.read_text("utf-8")
    filled = text.replace(_NO_BASE, f"`{Path(base).name}`, a local model")
    filled = filled.replace(_NO_NAME, f'model="{folder.name}"')
    if filled != text:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(filled, "utf-8")
        temporary.replace(path)
