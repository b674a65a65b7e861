"""`depthmix train` in two real processes gives what one process gives."""

import sys
from pathlib import Path

from launching import launch, run
from parameters import assert_same
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("command.py")
# Eight rows for training: were there nine, accelerate would repeat one in two processes.
OPTIONS = """
    --validation_split 0.33 --eval_strategy epoch --eval_accuracy 2 --max_steps 4 --logging_steps 1
    --k 2 --distill_fraction 1 --lora_dropout 0 --optim sgd --learning_rate 1 --use_cpu
"""


def test_the_command_in_two_processes_is_one(tiny, rows, tmp_path):
    def options(out, batch):
        files = ("--model_name_or_path", tiny, "--dataset", rows, "--output_dir", tmp_path / out)
        return ["train", *files, "--per_device_train_batch_size", batch, *OPTIONS.split()]

    run([sys.executable, WORKER, *options("one", 4)])
    launch(WORKER, 2, *options("two", 2))
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert_same(two, one)
