"""`depthmix train` from cached depth: by itself, packed, beside evaluation; told why where not."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from depthmix.cli import main
from depthmix.train import caching


def command(tiny, rows, out, *flags):
    arguments = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--output_dir", str(out)]
    common = ["--k", "2", "--num_train_epochs", "3", "--seed", "1", "--save_strategy", "no"]
    return [*arguments, *common, *flags]


def run_train(tiny, rows, out, capsys, *flags):
    assert main(command(tiny, rows, out, "--late_layers_only", *flags)) == 0
    return capsys.readouterr().out


def assert_same(a, b):
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora_dropout", "0.1"],
        ["--packing", "--max_length", "32"],
    ],
)
def test_train_caches_by_itself_and_gives_the_same_adapter(flags, tiny, rows, tmp_path, capsys):
    cached = ["--cache_dir", str(tmp_path / "cache"), "--eval_dataset", rows, *flags]
    output = run_train(tiny, rows, tmp_path / "a", capsys, *cached)
    assert "cache: up to" in output
    output = run_train(
        tiny, rows, tmp_path / "b", capsys, "--cache", "off", "--eval_dataset", rows, *flags
    )
    assert "cache:" not in output
    assert_same(tmp_path / "a", tmp_path / "b")
    output = run_train(tiny, rows, tmp_path / "c", capsys, *cached)
    assert "24 rows are there already" in output  # twelve to train on, twelve to evaluate on
    assert_same(tmp_path / "c", tmp_path / "b")


def test_any_frozen_layer_is_reason_enough(tiny, rows, tmp_path, capsys):
    cached = ["--cache_dir", str(tmp_path / "cache")]
    assert main(command(tiny, rows, tmp_path / "a", "--method", "none", *cached)) == 0
    assert "cache: up to" in capsys.readouterr().out
    assert main(command(tiny, rows, tmp_path / "b", *cached)) == 0
    output = capsys.readouterr().out
    assert "cache" not in output  # LoRA on all layers: nothing to say


def test_cache_on_says_why_it_cannot(tiny, rows, tmp_path, capsys):
    assert main(command(tiny, rows, tmp_path / "o", "--cache", "on")) == 2
    assert "cache: model.layers.0." in (said := capsys.readouterr().err)
    assert "is trained, in the first layer" in said


@pytest.mark.parametrize(("cache", "status"), [("on", 2), ("auto", 0)])
def test_noise_that_begins_with_training(cache, status, tiny, rows, tmp_path, capsys, caplog):
    flags = ["--late_layers_only", "--neftune_noise_alpha", "5", "--cache", cache]
    flags += ["--cache_dir", str(tmp_path / "cache")]
    assert main(command(tiny, rows, tmp_path / "o", *flags)) == status
    said = capsys.readouterr().err + caplog.text
    assert said.count("NEFTune") == 1
    assert not any((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize(
    ("kind", "message"), [("FSDP", "FSDP: no process"), ("DEEPSPEED", "DEEPSPEED: no process")]
)
def test_sharded_models_are_refused_by_name(
    kind, message, tiny, rows, tmp_path, capsys, monkeypatch
):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    found = property(lambda _self: DistributedType(kind))
    real = caching._require_supported

    def require(arguments, trainer):
        with monkeypatch.context() as patch:
            patch.setattr(Accelerator, "distributed_type", found)
            real(arguments, trainer)

    monkeypatch.setattr(caching, "_require_supported", require)
    flags = ["--late_layers_only", "--cache", "on"]
    assert main(command(tiny, rows, tmp_path / "o", *flags)) == 2
    assert f"cache: {message}" in capsys.readouterr().err


def test_rows_are_read_ahead(tiny, rows, tmp_path, monkeypatch):
    """Under the keys that the forwards look up, once the first one has told the arithmetic."""
    from depthmix.cache.store import StateStore

    ahead, looked = [], []
    monkeypatch.setattr(StateStore, "read_ahead", lambda _self, keys: ahead.append(keys))
    real = StateStore.knows
    monkeypatch.setattr(
        StateStore, "knows", lambda self, keys: looked.append(keys) or real(self, keys)
    )
    flags = ["--late_layers_only", "--cache_dir", str(tmp_path / "cache")]
    assert main(command(tiny, rows, tmp_path / "o", *flags)) == 0
    assert len(looked) == 6
    assert all(keys in ahead for keys in looked[2:])


def test_a_run_that_is_killed_leaves_a_cache_that_can_be_used(tiny, rows, tmp_path, capsys):
    cached = ["--late_layers_only", "--cache_dir", str(tmp_path / "cache")]
    program = (
        "import sys, depthmix.cache.store as s; s.SAVE_SECONDS = s.LOOK_SECONDS = 0.0;"
        "from depthmix.cli import main; main(sys.argv[1:])"
    )
    arguments = command(tiny, rows, tmp_path / "a", "--num_train_epochs", "10000", *cached)
    with subprocess.Popen([sys.executable, "-c", program, *arguments]) as process:
        while process.poll() is None and not any((tmp_path / "cache").rglob("*.index")):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    run_train(tiny, rows, tmp_path / "b", capsys, *cached)
    run_train(tiny, rows, tmp_path / "c", capsys, "--late_layers_only", "--cache", "off")
    assert_same(tmp_path / "b", tmp_path / "c")
    sizes = [path.stat().st_size for path in (tmp_path / "cache").rglob("*.states")]
    assert sum(sizes) < 12 * 64 * 32 * 4 * 2
