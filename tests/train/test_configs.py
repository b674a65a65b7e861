"""The recipes in configs/: every cell of the paper's design parses, and one of each kind runs."""

import json
from itertools import product
from pathlib import Path

import pytest
import yaml

from depthmix.cli import main
from depthmix.train.arguments import parse

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = CONFIGS / "paper"
MODELS, METHODS, SETS = (
    sorted((PAPER / part).glob("*.yaml")) for part in ("models", "methods", "sets")
)


def test_every_part_is_there():
    assert [len(part) for part in (MODELS, METHODS, SETS)] == [4, 6, 2]


@pytest.mark.parametrize(
    "cell", list(product(MODELS, METHODS, SETS)), ids=lambda c: "-".join(p.stem for p in c)
)
def test_cell_parses(cell, tmp_path):
    arguments = parse([*map(str, cell), "--output_dir", str(tmp_path), "--bf16", "false"])
    method = cell[1].stem
    assert arguments.run.mode is ("mode" in method)
    assert arguments.run.method == {"mode": "none"}.get(method, method.split("+")[0].split("-")[-1])
    assert arguments.training.num_train_epochs == 3
    if arguments.run.mode:
        assert arguments.mode.adaptation == "norm"
        assert arguments.mode.router_prior is None


@pytest.mark.parametrize("method", METHODS, ids=lambda path: path.stem)
def test_method_runs_on_a_tiny_model_of_the_same_type(method, tiny, tmp_path):
    rows = [
        {"instruction": f"Add {i}.", "input": "", "output": f"{i}", "answer": ""} for i in range(4)
    ]
    data = tmp_path / "math_10k.json"
    data.write_text(json.dumps(rows))
    flags = {
        "model_name_or_path": tiny,
        "dataset": data,
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "warmup_steps": 0,
        "bf16": "false",
        "dtype": "float32",
    }
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    assert main(["train", str(MODELS[0]), str(method), str(SETS[0]), *given]) == 0
    assert (tmp_path / "out/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda p: p.stem
)
def test_accelerate_reads_the_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"]
