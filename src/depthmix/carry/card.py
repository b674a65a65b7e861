"""Describe MoDE in a model card, beside what PEFT and TRL write there."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from depthmix.model.runtime import Runtime

HEADING = "## Mixture-of-Depths Ensemble (MoDE)"


def write_card(folder: Path, runtime: Runtime) -> None:
    """Add, or bring up to date, the section on MoDE in `folder/README.md`."""
    mixture = runtime.mixture()
    if mixture is None or mixture.config.k == 1 or not folder.is_dir():
        return
    path = folder / "README.md"
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    before, _, after = card.text.partition(HEADING)
    after = after[after.find("\n## ") :] if "\n## " in after else ""
    settings = "\n".join(f"| `{k}` | `{v}` |" for k, v in mixture.config.to_dict().items())
    layers = ", ".join(runtime.anatomy.layer_paths)
    card.text = f"""{before.rstrip()}

{HEADING}

The model predicts with a learned ensemble of its late layers ({layers}); see
[arXiv 2410.13077](https://arxiv.org/abs/2410.13077). Load it with `depthmix.load(base_model,
folder)`: without it the weights of the ensemble are ignored.

| setting | value |
|---|---|
{settings}
{after}"""
    temporary = path.with_suffix(".tmp")
    card.save(temporary)
    temporary.replace(path)
