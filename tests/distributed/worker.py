"""One process of a training run: torchrun worker.py OUT [options]; see test_processes.py."""

import argparse
import os
import signal
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

import torch
from datasets import Dataset
from launching import leave
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import depthmix
from depthmix.train.interrupt import stopping_on_signals
from models import PLAIN, tiny_model

ROWS = 8


def rows(uneven):
    """Rows of token ids; of the uneven ones, every other pair supervises nothing at all."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(ROWS):
        ids = torch.randint(4, 97, (9,), generator=generator).tolist()
        silent = uneven and i % 4 >= 2
        labels = [-100] * 9 if silent else [-100] * (2 + i % 3) + ids[2 + i % 3 :]
        made.append({"input_ids": ids, "attention_mask": [1] * 9, "labels": labels})
    return made


class PadOnly:
    """What DataCollatorForSeq2Seq asks of a tokenizer; all rows have one length."""

    padding_side = "right"

    def pad(self, features, **_):
        return {k: torch.tensor([f[k] for f in features]) for k in features[0]}


def build(dtype):
    torch.manual_seed(0)
    base = tiny_model("llama").to(dtype)
    set_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = depthmix.attach(base, depthmix.MoDEConfig(k=3, **PLAIN), lora)
    with torch.no_grad():  # a gate that is no corner
        model.get_base_model().depthmix.modules_to_save["default"].norm.scale.normal_(std=0.1)
    return model


class Signalled(TrainerCallback):
    """Sends SIGTERM to the last process alone, in the middle of a step."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step == self.step - 1 and args.process_index == args.world_size - 1:
            signal.raise_signal(signal.SIGTERM)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--uneven", action="store_true")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--bf16-base", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--signal-in", type=int, help="step in which the last process is signalled")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = build(torch.bfloat16 if options.bf16_base else torch.float32)
    groups = depthmix.param_groups(model, lr=1e-2)
    fsdp = {"fsdp": True, "fsdp_config": {"version": 2}} if options.fsdp else {}
    arguments = TrainingArguments(
        str(options.out),
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        max_steps=options.steps,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=options.stop_after or 10_000,
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        **fsdp,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows(options.uneven)),
        data_collator=lambda features: PadOnly().pad(features),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"params": groups, "lr": 1e-2}),
    )
    if options.stop_after:

        class Stop(TrainerCallback):
            def on_step_end(self, args, state, control, **_):
                if state.global_step == options.stop_after:
                    control.should_save = control.should_training_stop = True

        trainer.add_callback(Stop())
    if options.signal_in is not None:
        trainer.add_callback(Signalled(options.signal_in))
    with stopping_on_signals(trainer):
        trainer.train(resume_from_checkpoint=options.resume or None)
    trainer.save_model(str(options.out / "final"))
    if trainer.is_world_process_zero():
        torch.save(trainer.state.log_history, options.out / "log.pt")


if __name__ == "__main__":
    main()
    leave()
