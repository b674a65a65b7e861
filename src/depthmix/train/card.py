"""The model card of a run on a local base, of which TRL writes "fine-tuned version of [None]"."""

from __future__ import annotations

from pathlib import Path

_UNNAMED = "[None](https://huggingface.co/None)"


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
