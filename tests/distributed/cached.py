"""One process of a Trainer run from cached depth: torchrun cached.py OUT CACHE [--off]."""

import argparse
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

import torch
from datasets import Dataset
from launching import leave
from peft import LoraConfig
from transformers import Trainer, TrainingArguments, set_seed
from worker import PadOnly, rows

import depthmix
import depthmix.cache.store as store
from depthmix.cache.depth import cached_depth
from models import PLAIN, tiny_model


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--off", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    store.SAVE_SECONDS = store.LOOK_SECONDS = 0.0
    torch.manual_seed(0)
    base = tiny_model("llama")
    set_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = depthmix.attach(base, depthmix.MoDEConfig(k=2, **PLAIN), lora, tuned_layers=2)
    arguments = TrainingArguments(
        str(options.out),
        per_device_train_batch_size=1,
        num_train_epochs=6,
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        ddp_backend="gloo",
    )
    dataset = Dataset.from_list(rows(uneven=False))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=lambda features: PadOnly().pad(features),
    )
    tokens = sum(map(len, dataset["input_ids"]))
    context = cached_depth(model, tokens=tokens, folder=options.cache)
    with nullcontext() if options.off else context as cache:
        trainer.train()
    rank = arguments.process_index
    if rank == 0:
        trainer.save_model(str(options.out))
    if cache is not None:
        torch.save((cache.hits, cache.misses), options.out / f"{rank}.pt")


if __name__ == "__main__":
    main()
    leave()
