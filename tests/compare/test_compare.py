"""`depthmix compare`: experiment files, rows, intervals, and a whole comparison of tiny runs."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from depthmix.cli import main
from depthmix.compare.bootstrap import differences, paired_interval
from depthmix.compare.experiment import Task, read_experiment
from depthmix.compare.rows import load_rows
from depthmix.errors import ConfigError

EXPERIMENT = {
    "model_name_or_path": "m",
    "output_dir": "out",
    "baseline": "lora",
    "methods": {"lora": {"mode": False}, "lora+mode": {"k": 2}},
    "tasks": {"sums": {"dataset": ["rows.jsonl"], "train_rows": 4}},
}


def write(tmp_path, **changes):
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(EXPERIMENT | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "full"}, "baseline 'full' is none of the methods: lora, lora"),
        ({"seed": 3}, r"unknown seed; known: .*seeds"),
        ({"split": "train"}, "split must be one of validation, test"),
        ({"seeds": ["a"]}, "seeds must be a list of integers"),
        ({"tasks": {"sums": {"dataset": ["x"]}}}, "task sums: train_rows missing"),
        ({"tasks": {"sums": {"rows": 3}}}, "task sums: unknown rows"),
        ({"tasks": {"sums": {"dataset": "x", "train_rows": 1}}}, "dataset must be a list"),
        ({"tasks": {"sums": {"dataset": ["x"], "train_rows": 0}}}, "train_rows must be an integer"),
        ({"methods": []}, "methods: expected a mapping"),
    ],
)
def test_wrong_experiment_is_refused_by_place(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_experiment(write(tmp_path, **changes))
    assert "experiment.yaml" in str(error.value)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return str(path)


def test_rows_to_train_and_to_score_on_are_apart(pairs):
    task = Task([pairs], train_rows=5, validation_rows=4, test_rows=3)
    rows = load_rows("sums", task)
    assert len(rows.test) == 3
    assert len(rows.validation) == 4
    assert len(rows.pool) == 13  # 20 different rows, the repeated one counted once
    scored = {row["prompt"] for row in [*rows.test, *rows.validation]}
    assert len(scored) == 7
    for seed in (1, 2):
        drawn = rows.training(5, seed)
        assert not scored & {row["prompt"] for row in drawn}
    assert rows.training(5, 1) == rows.training(5, 1) != rows.training(5, 2)
    assert load_rows("sums", task) == rows


def test_too_few_rows_are_refused(pairs):
    with pytest.raises(ConfigError, match="task sums: 20 different rows, but 7 to score on and 15"):
        load_rows("sums", Task([pairs], train_rows=15, validation_rows=4, test_rows=3))


def naive_interval(better, weights, resamples):
    """One draw at a time."""
    generator = np.random.default_rng(1)
    seeds, rows = better.shape
    values = []
    for _ in range(resamples):
        i = generator.integers(rows, size=rows)
        s = generator.integers(seeds, size=seeds)
        values.append(np.mean([better[j, i].sum() / weights[i].sum() for j in s]))
    return better.sum() / weights.sum() / seeds, *np.quantile(values, [0.025, 0.975])


def test_interval_equals_the_naive_bootstrap():
    generator = np.random.default_rng(3)
    better, weights = generator.normal(0.3, 1, (3, 80)), generator.integers(1, 9, 80).astype(float)
    expected = naive_interval(better, weights, 4000)
    assert paired_interval(better, weights) == pytest.approx(expected, abs=0.01)


def test_differences_are_positive_where_the_method_is_better():
    rows = {
        ("t", "lora", 1): {"tokens": [2, 2], "loss": [4.0, 2.0], "exact": [False, True]},
        ("t", "mode", 1): {"tokens": [2, 2], "loss": [2.0, 2.0], "exact": [True, True]},
        ("t", "mode", 2): {"tokens": [2, 2], "loss": [9.0, 9.0], "exact": [True, True]},
    }
    loss, accuracy = differences(rows, "lora")
    assert (loss["metric"], loss["mean"]) == ("loss", 0.5)
    assert (accuracy["metric"], accuracy["mean"]) == ("accuracy", 0.5)
    assert loss["seeds"] == [1]  # the seed that the baseline has too
    assert loss["low"] <= loss["mean"] <= loss["high"]


def test_whole_comparison_is_cached(tiny, pairs, tmp_path, monkeypatch, capsys):
    path = write(
        tmp_path,
        model_name_or_path=tiny,
        output_dir=str(tmp_path / "out"),
        seeds=[1],
        defaults={"per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1},
        tasks={"sums": {"dataset": [pairs], "train_rows": 4, "validation_rows": 2, "test_rows": 3}},
    )
    assert main(["compare", str(path), "--workers", "2"]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    runs = {run["method"]: run for run in results["runs"]}
    assert set(runs) == {"lora", "lora+mode"}
    assert len(runs["lora+mode"]["gate"]) == 2
    assert runs["lora"]["gate"] == []
    assert runs["lora+mode"]["trainable_parameters"] > runs["lora"]["trainable_parameters"]
    assert [step for step, _ in runs["lora"]["loss_curve"]] == [1, 2]
    assert {d["metric"] for d in results["differences"]} == {"loss", "accuracy"}
    text = (tmp_path / "out/results.md").read_text()
    assert "| lora+mode |" in text
    assert (tmp_path / "out/results.png").exists()
    adapters = sorted((tmp_path / "out").rglob("adapter_model.safetensors"))
    assert len(adapters) == 2
    before = [file.stat().st_mtime_ns for file in adapters]
    assert main(["compare", str(path)]) == 0
    assert [file.stat().st_mtime_ns for file in adapters] == before


@pytest.mark.optional
@pytest.mark.filterwarnings("ignore")
def test_runs_are_spread_by_ray(tiny, pairs, tmp_path):
    pytest.importorskip("ray", reason="`make optional` installs Ray")
    path = write(
        tmp_path,
        model_name_or_path=tiny,
        output_dir=str(tmp_path / "out"),
        seeds=[1],
        methods={"lora": {"mode": False, "max_steps": 1}},
        tasks={"sums": {"dataset": [pairs], "train_rows": 2, "validation_rows": 1, "test_rows": 2}},
    )
    assert main(["compare", str(path), "--ray", "local", "--gpus", "0"]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert len(results["runs"]) == 1


def test_failed_run_is_named_and_loses_no_other(tiny, pairs, tmp_path, capsys):
    path = write(
        tmp_path,
        model_name_or_path=tiny,
        output_dir=str(tmp_path / "out"),
        seeds=[1],
        methods={"lora": {"mode": False, "max_steps": 1}, "wrong": {"k": 99}},
        tasks={"sums": {"dataset": [pairs], "train_rows": 2, "validation_rows": 1, "test_rows": 2}},
    )
    assert main(["compare", str(path)]) == 1
    assert "failed: sums, wrong, seed 1" in capsys.readouterr().err
    log = next(Path(tmp_path / "out").rglob("sums-wrong*/log.txt")).read_text()
    assert "k = 99" in log
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [run["method"] for run in results["runs"]] == ["lora"]


def test_many_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", str(write(tmp_path))]) == 2
    assert "starts its runs itself" in capsys.readouterr().err
