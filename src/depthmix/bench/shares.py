"""What share of a training step, of a prefill and of a token is depthmix's own work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from depthmix.bench.decoding import decoding_calls
from depthmix.bench.training import LORA_MODE, Setting, build
from depthmix.model.language import LOSS_LABEL
from depthmix.model.paths import MIXTURE_LABEL

_WHOLE = "the whole"


def measure_shares(setting: Setting, prompt: int, tokens: int) -> dict[str, dict[str, Any]]:
    """Return seconds of the whole and of depthmix's parts, forward; a share of the whole each.

    The loss takes its gradients in the forward, so its share is both.

    Args:
        setting: model and rows of the step.
        prompt: tokens of the prefill.
        tokens: tokens decoded after it.
    """
    calls = {"training step": build(LORA_MODE, setting)[1]}
    calls |= decoding_calls(setting, prompt, tokens)
    return {name: _shares(call) for name, call in calls.items()}


def _shares(call: Callable[[], Any]) -> dict[str, Any]:
    call()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler, record_function(_WHOLE):
        call()
    seconds = {event.key: event.cpu_time_total / 1e6 for event in profiler.key_averages()}
    ours = seconds.get(MIXTURE_LABEL, 0.0) + seconds.get(LOSS_LABEL, 0.0)
    return {"seconds": seconds[_WHOLE], "ours_seconds": ours, "share": ours / seconds[_WHOLE]}
