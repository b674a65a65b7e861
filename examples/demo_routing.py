"""The demo's picture: how the router weighs the late layers, token by token of a few replies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

import depthmix

PICTURED = 6  # replies
NEW_TOKENS = 16  # more than any right answer has


@dataclass(frozen=True)
class Reply:
    """A prompt, the tokens that the model answered, and the gate over layers of each."""

    prompt: str
    layers: tuple[int, ...]
    tokens: list[str]
    gates: list[list[float]]


def plot_routing(run: Path, base: str, path: Path) -> None:
    """Draw the routing in replies to the first rows that a run of `depthmix compare` scored.

    Args:
        run: folder of the run.
        base: the model that it tuned.
        path: of the picture.
    """
    model: Any = depthmix.load(AutoModelForCausalLM.from_pretrained(base), run / "tuned").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = (run / "score.jsonl").read_text("utf-8").splitlines()[:PICTURED]
    replies = [reply(model, tokenizer, json.loads(row)["prompt"]) for row in rows]
    _draw(replies, [f"layer {layer + 1}" for layer in replies[0].layers], path)


@torch.no_grad()
def reply(model: Any, tokenizer: Any, prompt: str) -> Reply:
    """Answer a prompt greedily and record the router."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    with depthmix.routing(model) as record:
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    # One forward a token; the first one is the prompt's, and its last token predicts the first.
    gates = [gate[0, -1].tolist() for gate in record.gates]
    return Reply(prompt, record.layers, [tokenizer.decode(token) for token in new], gates)


def _draw(replies: list[Reply], layers: list[str], path: Path) -> None:
    figure = Figure(figsize=(9, 0.6 + 1.05 * len(replies)), layout="constrained")
    colours = [mpl.colormaps["viridis"](0.15 + 0.7 * i / len(layers)) for i in range(len(layers))]
    longest = max(len(reply.tokens) for reply in replies)
    for axes, one in zip(figure.subplots(len(replies), squeeze=False)[:, 0], replies, strict=True):
        _draw_reply(axes, one, layers, colours)
        axes.set_xlim(-0.6, longest - 0.4)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(layers))
    figure.savefig(path, dpi=120)


def _draw_reply(axes: Axes, one: Reply, layers: list[str], colours: list[Any]) -> None:
    """One bar a token of the reply, cut by the weights of the layers that predicted it."""
    places = range(len(one.tokens))
    bottom = [0.0] * len(places)
    for i, (layer, colour) in enumerate(zip(layers, colours, strict=True)):
        weights = [gate[i] for gate in one.gates]
        axes.bar(places, weights, bottom=bottom, color=colour, width=0.94, label=layer)
        bottom = [b + w for b, w in zip(bottom, weights, strict=True)]
    axes.set_title(_visible(one.prompt[-90:], blank=" "), fontsize=8, loc="left")
    axes.set_xticks(places, [_visible(token) for token in one.tokens], fontsize=8)
    axes.set(ylim=(0, 1), yticks=[0, 1])


def _visible(text: str, blank: str = "\N{OPEN BOX}") -> str:
    """Show blanks and line breaks; a dollar sign would begin a formula."""
    return repr(text)[1:-1].replace(" ", blank).replace("$", r"\$")
