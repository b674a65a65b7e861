"""All methods counted for one model, and what is printed of them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from tqdm import tqdm
from transformers import PretrainedConfig

from depthmix.config import MoDEConfig
from depthmix.plan.cards import Fit, fit
from depthmix.plan.memory import Bill, Memory, bill_of
from depthmix.plan.methods import Method
from depthmix.plan.profile import (
    Base,
    Profile,
    Setting,
    profile_adapter,
    profile_base,
    profile_full,
)
from depthmix.tables import print_figures


@dataclass(frozen=True)
class Counted:
    """What was counted.

    Attributes:
        base: the model.
        setting: what is trained on.
        bills: of each method, by name.
        note: what had to be left out for PEFT to take the model.
    """

    base: Base
    setting: Setting
    bills: dict[str, Bill]
    note: str | None


def count(
    config: PretrainedConfig,
    setting: Setting,
    methods: Mapping[str, Method],
    k: int,
    rank: int,
    adapter: Callable[[int], PeftConfig],
    checkpointing: Callable[[Method], bool],
) -> Counted:
    """Count what methods cost, from a model's configuration.

    Args:
        config: of the model.
        setting: what is trained on, and with what.
        methods: by name.
        k: late layers.
        rank: of LoRA, where the method does not say.
        adapter: gives LoRA of a rank.
        checkpointing: whether a method makes activations again in the backward pass.

    Raises:
        ConfigError: the model cannot be run without weights, or has too few layers.
    """
    base = profile_base(config, setting)
    mode = MoDEConfig(k=k)
    for method in methods.values():
        method.tuned(len(base.kinds), k)  # refused before anything is counted
    keys = {name: (method.tuning, method.rank or rank) for name, method in methods.items()}
    profiles: dict[Any, Profile | None] = {}
    for key in tqdm(dict.fromkeys(keys.values()), desc="counting", leave=False, disable=None):
        profiles[key] = _profile(config, base, setting, *key, adapter)
    bills = {
        name: bill_of(base, profiles[keys[name]], method, mode, setting, checkpointing(method))
        for name, method in methods.items()
    }
    notes = [profile.note for profile in profiles.values() if profile and profile.note]
    return Counted(base, setting, bills, notes[0] if notes else None)


def _profile(
    config: PretrainedConfig,
    base: Base,
    setting: Setting,
    tuning: str,
    rank: int,
    adapter: Callable[[int], PeftConfig],
) -> Profile | None:
    if tuning == "none":
        return None
    if tuning == "full":
        return profile_full(config, base, setting)
    return profile_adapter(config, base, adapter(rank), setting)


@dataclass(frozen=True)
class Plan:
    """The plan of a model.

    Attributes:
        model: its name.
        card: name of a graphics card, if one was given.
        device_memory: bytes of a device that it is to fit, if they were given.
        cached_tokens: training tokens whose states a cache would hold.
        counted: what the methods cost.
    """

    model: str
    card: str | None
    device_memory: int | None
    cached_tokens: int
    counted: Counted

    @property
    def cache_bytes(self) -> int:
        """Bytes on disk of cached depth."""
        setting, width = self.counted.setting, self.counted.base.sizes.width
        return self.cached_tokens * width * setting.dtype.itemsize

    def fits(self, memory: Memory | None) -> Fit | None:
        """Return whether a step fits the device, if one was given."""
        if memory is None or self.device_memory is None:
            return None
        return fit(memory.total, self.device_memory)

    def as_dict(self) -> dict[str, Any]:
        """Return everything, in bytes and FLOPs."""
        base, setting = self.counted.base, self.counted.setting
        return {
            "model": self.model,
            "parameters": base.sizes.parameters,
            "layers": len(base.kinds),
            "attention": base.attention,
            "setting": asdict(setting) | {"dtype": str(setting.dtype).removeprefix("torch.")},
            "card": self.card,
            "device_memory": self.device_memory,
            "cache_bytes": self.cache_bytes,
            "note": self.counted.note,
            "methods": {name: self._entry(bill) for name, bill in self.counted.bills.items()},
        }

    def _entry(self, bill: Bill) -> dict[str, Any]:
        entry = asdict(bill)
        for name in ("memory", "memory_4bit"):
            if memory := getattr(bill, name):
                entry[name] |= {"total": memory.total, "fits": self.fits(memory)}
        entry["flops"]["step"] = bill.flops.step
        return entry

    def print(self) -> None:
        """Print two tables and a few lines, in at most 80 columns."""
        base, setting = self.counted.base, self.counted.setting
        name = Path(self.model).name if Path(self.model).is_dir() else self.model
        print(f"{name}: {base.sizes.parameters:,} parameters, {len(base.kinds)} layers")
        dtype = str(setting.dtype).removeprefix("torch.")
        print(
            f"{setting.rows} x {setting.length} tokens on each device, "
            f"{setting.supervised:.0%} supervised; {dtype}, {base.attention} attention"
        )
        self._print_memory()
        self._print_flops()
        self._print_rest()

    def _print_memory(self) -> None:
        bills, setting = self.counted.bills, self.counted.setting
        largest = max(bill.memory.total for bill in bills.values())
        unit, size = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
        header = ["method", "model", "grads", "Adam", "act.", "loss", "total", "4 bits"]
        rows = []
        for name, bill in bills.items():
            memory = bill.memory
            parts = (*asdict(memory).values(), memory.total)
            small = bill.memory_4bit.total / size if bill.memory_4bit else None
            rows.append([name, *(figure(part / size) for part in parts), figure(small)])
            if self.device_memory is not None:
                rows[-1].append(self._verdict(bill))
        if self.device_memory is not None:
            header.append("fits")
        devices = "one device"
        if setting.gpus > 1:
            devices = f"each of {setting.gpus} devices, {'' if setting.sharded else 'not '}sharded"
        print_figures(f"memory of a step in {unit} on {devices}", header, rows)

    def _verdict(self, bill: Bill) -> str:
        """Return yes, tight or no, or 4bit where only those fit."""
        whole, small = self.fits(bill.memory), self.fits(bill.memory_4bit)
        return "4bit" if whole == "no" and small == "yes" else str(whole)

    def _print_flops(self) -> None:
        bills = self.counted.bills
        largest = max(bill.flops.step for bill in bills.values())
        unit, size = ("TFLOP", 10**12) if largest >= 10**12 else ("GFLOP", 10**9)
        header = ["method", "trained", "layers", "forward", "backw.", "loss", "step", "cached"]
        rows = []
        for name, bill in bills.items():
            flops = bill.flops
            parts = (flops.forward, flops.backward, flops.loss, flops.step, flops.cached)
            rows.append(
                [
                    name,
                    counted(bill.trained),
                    str(bill.tuned_layers),
                    *(figure(None if part is None else part / size) for part in parts),
                ]
            )
        print_figures(f"{unit} of a step; cached: later epochs from cached depth", header, rows)

    def _print_rest(self) -> None:
        base, bills = self.counted.base, self.counted.bills
        any_bill = next(iter(bills.values()))
        decode = min(bill.flops.decode for bill in bills.values())
        most = max(bill.flops.decode for bill in bills.values())
        again = [name for name, bill in bills.items() if bill.checkpointing]
        setting = self.counted.setting
        print(
            f"decoding: {decode / 1e9:,.3g} GFLOP a token after {setting.length} others, with MoDE "
            f"{most / decode:.4f} times that"
        )
        print(f"keys and values, or states: {any_bill.kv_bytes / 2**20:,.1f} MiB for this batch")
        print(
            f"cached depth: {self.cache_bytes / 2**30:,.2f} GiB on disk for "
            f"{self.cached_tokens:,} tokens"
        )
        print(f"gradient checkpointing: {', '.join(again) or 'none'}")
        if base.walking:
            print(
                "state-space layers are counted as they run without their own kernels\n"
                "(mamba-ssm, causal-conv1d), which keep far fewer activations"
            )
        if self.counted.note:
            print(textwrap.fill(f"note: {self.counted.note}", 79))
        if self.device_memory is not None:
            print(
                f"fits: {self.card or 'a device'} of {self.device_memory / 2**30:.1f} GiB; tight "
                "where 15 % more would not fit"
            )


def figure(value: float | None) -> str:
    """Return a number with three digits that count, or a dash."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def counted(count: int) -> str:
    """Return a count in thousands, millions or billions."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{figure(count / size)}{unit}"
    return str(count)
