"""One process of a Trainer run from a saved base: [torchrun] zero3.py BASE OUT.

In several processes DeepSpeed's ZeRO-3 spreads the weights, from the moment the base is loaded.
"""

import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
warnings.simplefilter("ignore")

import torch
from datasets import Dataset
from launching import leave
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from worker import PadOnly, rows

import depthmix
from models import PLAIN

ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "zero_optimization": {
        "stage": 3,
        # No weight stays for longer than its module runs.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "zero_allow_untested_optimizer": True,
}


def main():
    base, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        import deepspeed

        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        deepspeed.init_distributed("gloo")
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=4 // processes,
        max_steps=4,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        deepspeed=ZERO3 if processes > 1 else None,
    )
    model = AutoModelForCausalLM.from_pretrained(base)
    assert (processes > 1) == all(weight.numel() == 0 for weight in model.parameters())
    set_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = depthmix.attach(model, depthmix.MoDEConfig(k=3, **PLAIN), lora)
    groups = depthmix.param_groups(model, lr=1e-2)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Dataset.from_list(rows(uneven=False)),
        data_collator=lambda features: PadOnly().pad(features),
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"params": groups, "lr": 1e-2}),
    )
    trainer.train()
    trainer.save_model(str(out))


if __name__ == "__main__":
    main()
    leave()
