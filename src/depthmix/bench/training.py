"""A whole training step of every method that a user would choose between."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

import depthmix
from depthmix.bench.batch import IGNORED, make_batch
from depthmix.bench.measure import (
    CountHead,
    allocated_bytes,
    in_fresh_process,
    median_seconds,
    peak_bytes,
)
from depthmix.budgets import BUDGETS
from depthmix.carry.adapters import mode_only_config
from depthmix.carry.depth import restricted
from depthmix.model.active import host_of
from depthmix.model.discovery import discover
from depthmix.model.runtime import runtime_of
from depthmix.pretrained import Loading, load_base, load_tokenizer

Step = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """What all steps have in common.

    Attributes:
        model: folder or hub name.
        lengths: tokens of question and answer of the rows of the batch.
        k: late layers.
        loading: how the model is loaded.
    """

    model: str
    lengths: list[tuple[int, int]]
    k: int = 3
    loading: Loading = field(default_factory=Loading)

    def load(self) -> Any:
        """Load the base model anew."""
        return load_base(self.model, **self.loading.options())

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load its tokenizer."""
        return load_tokenizer(
            self.model,
            revision=self.loading.revision or "main",
            trust_remote_code=bool(self.loading.trust_remote_code),
        )


def measure_steps(
    setting: Setting, names: Sequence[str], repeats: int
) -> dict[str, dict[str, Any]]:
    """Return what one step of each named variant costs, the times of all of them taken in turn.

    The figures: median `seconds`; `peak_bytes` of the first step above the model; and `HeadCounts`.
    """
    peaks = {
        name: in_fresh_process(first_step_peak, name, setting)
        for name in tqdm(names, desc="peak memory", unit="method")
    }
    built = {name: build(name, setting) for name in names}
    counts = {}
    for name, (model, step) in built.items():
        with CountHead(model.get_output_embeddings().weight) as counter:
            step()
        counts[name] = asdict(counter.counts)
    steps = {name: step for name, (_, step) in built.items()}
    seconds = median_seconds(steps, repeats, warm_up=False)
    return {
        name: {"seconds": seconds[name], "peak_bytes": peaks[name], **counts[name]}
        for name in names
    }


def first_step_peak(name: str, setting: Setting) -> int:
    """Return the memory that a variant's first step takes beside its model, in bytes."""
    return peak_bytes(build(name, setting)[1])


def first_step_allocation(name: str, setting: Setting) -> int:
    """Return what the tensors of a variant's first step take beside its model, in bytes."""
    return allocated_bytes(build(name, setting)[1])


def build(name: str, setting: Setting) -> tuple[PreTrainedModel, Step]:
    """Return a variant's model and one training step of it on one batch, optimiser included."""
    model, step = prepared(name, setting)
    batch = make_batch(setting.lengths, model.config.vocab_size, next(model.parameters()).device)
    return host_of(model), partial(step, batch)


def prepared(name: str, setting: Setting) -> tuple[Any, Callable[[dict[str, Tensor]], None]]:
    """Return a variant's model, on its device, and a training step of any batch."""
    torch.manual_seed(0)
    model, trainer_class = VARIANTS[name](setting.load(), setting.k)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(trainer_class, model, setting, folder)
    optimizer = trainer.create_optimizer()
    model.train()

    def step(batch: dict[str, Tensor]) -> None:
        supervised = (batch["labels"][:, 1:] != IGNORED).sum()
        trainer.training_step(model, dict(batch), supervised)
        optimizer.step()
        optimizer.zero_grad()

    return model, step


def _trainer(trainer_class: type[Trainer], model: Any, setting: Setting, folder: str) -> Trainer:
    options: dict[str, Any] = {"report_to": [], "bf16": False}
    if trainer_class is not SFTTrainer:
        return trainer_class(model, TrainingArguments(folder, **options))
    prepared = {"skip_prepare_dataset": True}
    return SFTTrainer(
        model,
        SFTConfig(folder, dataset_kwargs=prepared, activation_checkpointing=False, **options),
        train_dataset=Dataset.from_dict({"input_ids": [[0]], "labels": [[0]]}),
        processing_class=setting.load_tokenizer(),
    )


def _lora_config(rank: int = 16) -> LoraConfig:
    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _lora(model: Any, k: int) -> tuple[Any, type[Trainer]]:
    return get_peft_model(model, _lora_config()), Trainer


def _chunked_lora(model: Any, k: int) -> tuple[Any, type[Trainer]]:
    """TRL's loss, which projects the supervised tokens only, in chunks."""
    return get_peft_model(model, _lora_config()), SFTTrainer


def _lora_mode(model: Any, k: int) -> tuple[Any, type[Trainer]]:
    return depthmix.attach(model, depthmix.MoDEConfig(k=k), _lora_config()), Trainer


def _lora_mode_all(model: Any, k: int) -> tuple[Any, type[Trainer]]:
    config = depthmix.MoDEConfig(k=k, distill_fraction=1.0)
    return depthmix.attach(model, config, _lora_config()), Trainer


def _lora_naive(model: Any, k: int) -> tuple[Any, type[Trainer]]:
    return _lora_mode(model, k)[0], NaiveTrainer


def _budget(name: str, model: Any, k: int) -> tuple[Any, type[Trainer]]:
    """A budget of `depthmix train`, without MoDE, by the fused loss."""
    budget, alone = BUDGETS[name], depthmix.MoDEConfig(k=1)
    lora = _lora_config(budget.rank)
    return depthmix.attach(model, alone, lora, tuned_layers=budget.tuned_layers), Trainer


def _late_lora(model: Any, k: int) -> tuple[Any, type[Trainer]]:
    anatomy = discover(model, depthmix.MoDEConfig(k=k))
    return get_peft_model(model, restricted(_lora_config(), anatomy, k)), Trainer


def _late_lora_mode(model: Any, k: int) -> tuple[Any, type[Trainer]]:
    config = depthmix.MoDEConfig(k=k)
    return depthmix.attach(model, config, _lora_config(), late_layers_only=True), Trainer


def _mode(model: Any, k: int) -> tuple[Any, type[Trainer]]:
    return depthmix.attach(model, depthmix.MoDEConfig(k=k), mode_only_config()), Trainer


LORA, CHUNKED_LORA, LORA_MODE = "lora", "lora, TRL loss", "lora+mode"
LORA_NAIVE = "lora+mode, naive"
LATE_LORA_MODE, HALF, LIGHT = "late-lora+mode", "half", "light"
VARIANTS: dict[str, Callable[[nn.Module, int], tuple[Any, type[Trainer]]]] = {
    LORA: _lora,
    CHUNKED_LORA: _chunked_lora,
    LORA_MODE: _lora_mode,
    "lora+mode, all distilled": _lora_mode_all,
    LORA_NAIVE: _lora_naive,
    HALF: partial(_budget, HALF),
    LIGHT: partial(_budget, LIGHT),
    "late-lora": _late_lora,
    LATE_LORA_MODE: _late_lora_mode,
    "mode": _mode,
}


class NaiveTrainer(Trainer):
    """MoDE as one would write it: full logits of every late layer, autograd for the rest."""

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Tensor:
        """Return what MoDE's own path gives, to rounding, when all tokens are distilled."""
        labels = inputs["labels"][:, 1:]
        runtime, host = runtime_of(model), host_of(model)
        states: list[Tensor] = []
        handles = [
            host.get_submodule(path).register_forward_hook(
                lambda _module, _args, output: states.append(output)
            )
            for path in runtime.anatomy.layer_paths
        ]
        host.base_model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        for handle in handles:
            handle.remove()
        norm: Any = host.get_submodule(str(runtime.anatomy.norm_path))
        mixture = runtime.mixture()
        assert mixture is not None
        layer_states, gate = mixture.adapt(torch.stack([norm.forward(s) for s in states], dim=-2))
        head: Any = host.get_output_embeddings()
        logits = head(layer_states.to(head.weight.dtype))[:, :-1].float()
        ensemble = (gate[:, :-1].unsqueeze(-1) * logits).sum(-2)
        loss = F.cross_entropy(ensemble.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        teacher = logits[..., -1, :].detach().log_softmax(-1)
        mask = labels != IGNORED
        for late in logits[..., :-1, :].log_softmax(-1).unbind(-2):
            divergence = F.kl_div(late, teacher, log_target=True, reduction="none").sum(-1)
            loss = loss + (divergence * mask).sum() / mask.sum() / (logits.shape[-2] - 1)
        return loss
