"""The ratios that the benchmarks are about, out of the figures of one run."""

from __future__ import annotations

from typing import Any

from depthmix.bench import decoding, epoch, loss, training

Figures = dict[str, dict[str, Any]]


def step_ratios(steps: Figures) -> dict[str, float]:
    """Return time and peak memory of a LoRA + MoDE step against LoRA's."""
    ours, lora = steps[training.LORA_MODE], steps[training.LORA]
    chunked = steps[training.CHUNKED_LORA]
    return {
        "step_vs_hf_lora": ours["seconds"] / lora["seconds"],
        "step_vs_chunked_lora": ours["seconds"] / chunked["seconds"],
        "peak_vs_hf_lora": ours["peak_bytes"] / lora["peak_bytes"],
    }


def loss_ratios(losses: Figures) -> dict[str, float]:
    """Return memory and time of the loss alone against the naive one's."""
    ours, naive = losses[loss.OURS], losses[loss.NAIVE]
    return {
        "loss_memory_vs_naive": ours["peak_bytes"] / naive["peak_bytes"],
        "loss_time_vs_naive": ours["seconds"] / naive["seconds"],
    }


def epoch_ratios(epochs: Figures) -> dict[str, float]:
    """Return the times of each variant's epochs.

    One from the cache against LoRA's, and the first one against the same without the cache.
    """
    ratios = {}
    for variant in epoch.CACHED:
        later, first, uncached = (
            epochs[epoch.row(variant, which)]["seconds"]
            for which in (epoch.LATER, epoch.FIRST, epoch.UNCACHED)
        )
        ratios[f"{variant}_cached_vs_lora"] = later / epochs[epoch.LORA_EPOCH]["seconds"]
        ratios[f"{variant}_first_vs_uncached"] = first / uncached
    return ratios


def decoding_ratios(decoded: Figures) -> dict[str, float]:
    """Return a token's latency, and a prefill's with its memory, against the merged LoRA's."""
    ours, merged = decoded[decoding.MODE], decoded[decoding.MERGED]
    return {
        "decode_vs_merged": ours["token_seconds"] / merged["token_seconds"],
        "prefill_vs_merged": ours["prefill_seconds"] / merged["prefill_seconds"],
        "prefill_memory_vs_merged": ours["prefill_peak_bytes"] / merged["prefill_peak_bytes"],
    }
