"""`depthmix compare`: experiment files, rows, intervals, and a whole comparison of tiny runs."""

import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from depthmix.charts import looks
from depthmix.cli import main
from depthmix.compare.bootstrap import differences, paired_interval
from depthmix.compare.engine import prepare
from depthmix.compare.experiment import Task, read_experiment
from depthmix.compare.report import _plot_curves, markdown, plot
from depthmix.compare.rows import load_rows
from depthmix.compare.spread import devices, run_here
from depthmix.errors import ConfigError
from depthmix.train.arguments import split_own
from depthmix.train.trl_options import trl_options

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
        ({"baseline": "full"}, r"yaml:1: baseline: 'full' is none of the methods: lora, lora"),
        ({"seed": 3}, r"yaml:\d+: seed: no such option; did you mean seeds\?"),
        ({"split": "train"}, r"yaml:\d+: split: expected one of validation, test, not 'train'"),
        ({"seeds": ["a"]}, "seeds: expected a list of integers, not"),
        ({"seeds": [-1]}, "seeds: must be >= 0 and <= 4294967295, not -1"),
        ({"seeds": []}, "seeds: needs a value"),
        ({"tasks": {"sums": {"dataset": ["x"]}}}, "task sums: train_rows missing"),
        ({"tasks": {"sums": {"rows": 3}}}, r"tasks\.sums\.rows: no such option; did you mean"),
        ({"tasks": {"sums": {"dataset": ["x"], "train_rows": 0}}}, "train_rows: must be >= 1"),
        (
            {"tasks": {"s": {"dataset": ["x"], "train_rows": 1, "dataset_format": "gsm"}}},
            "one of auto",
        ),
        ({"tasks": {}}, "tasks missing"),
        ({"methods": []}, "methods: must hold `key: value` lines"),
        ({"methods": {"lora": 3}}, r"methods\.lora: must hold `key: value` lines"),
        ({"model_name_or_path": ""}, "model_name_or_path missing"),
    ],
)
def test_wrong_experiment_is_refused_by_place(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        read_experiment(write(tmp_path, **changes))
    assert "experiment.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"learnin_rate": 1e-3}, r"methods\.wrong\.learnin_rate: no such option; did you mean lea"),
        ({"lora_r": "many"}, r"yaml:\d+: methods\.wrong\.lora_r: expected an integer, not 'many'"),
        ({"k": 0}, r"methods\.wrong\.k must be an integer >= 1"),
        ({"optim": "lomo"}, "method wrong: optim: You need to install `lomo_optim`"),
        ({"method": "none", "mode": False}, "nothing is trained"),
        ({"seed": 3}, r"methods\.wrong\.seed: decided by the comparison, not by a method"),
    ],
)
def test_methods_are_checked_before_the_first_run(tmp_path, capsys, method, message):
    methods = {**EXPERIMENT["methods"], "wrong": method}
    assert main(["compare", str(write(tmp_path, methods=methods))]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_matplotlib_is_asked_for_before_the_first_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("depthmix.commands.parser.find_spec", lambda name: None)
    assert main(["compare", str(write(tmp_path))]) == 2
    assert "needs matplotlib: pip install 'depthmix[plot]'" in capsys.readouterr().err


def test_values_are_read_as_train_reads_them(tmp_path):
    """YAML 1.1 has 1e-3 as text and no as false."""
    path = tmp_path / "experiment.yaml"
    path.write_text(
        "model_name_or_path: m\noutput_dir: o\nbaseline: lora\n"
        "defaults: {learning_rate: 1e-3, save_strategy: no}\n"
        "methods:\n  lora: {mode: false}\n  other:\n"
        "tasks: {sums: {dataset: rows.jsonl, train_rows: 4}}\n"
    )
    experiment = read_experiment(path)
    assert experiment.options_of("lora") == {
        **{"learning_rate": "1e-3", "save_strategy": "no"},
        "mode": "false",
    }
    assert list(experiment.methods["other"]) == ["learning_rate", "save_strategy"]
    assert experiment.tasks["sums"].dataset == ["rows.jsonl"]
    assert experiment.seeds == [1, 2, 3]


def test_flags_of_loading_win_over_all_methods(tmp_path, monkeypatch):
    monkeypatch.setattr("depthmix.commands.compare.find_run", lambda *_: None)
    seen = []

    def prepare(experiment):
        seen.append(experiment)
        raise ConfigError("enough")

    monkeypatch.setattr("depthmix.compare.engine.prepare", prepare)
    path = write(tmp_path, defaults={"dtype": "float32", "lora_r": 4})
    flags = ["--dtype", "bfloat16", "--revision", "v2", "--no-trust-remote-code"]
    main(["compare", str(path), *flags])
    loading = {"dtype": "bfloat16", "model_revision": "v2", "trust_remote_code": "False"}
    assert seen[0].options_of("lora+mode") == {"lora_r": "4", "k": "2", **loading}
    run, _, rest = split_own(seen[0].methods["lora"])
    assert run.mode is False
    model, training, _ = trl_options(run, rest)
    assert (model.dtype, model.model_revision) == ("bfloat16", "v2")
    assert training.trust_remote_code is False


def test_a_folder_has_no_revision(tiny, pairs, tmp_path, capsys):
    tasks = {"sums": {"dataset": [pairs], "train_rows": 2, "test_rows": 2}}
    path = write(tmp_path, model_name_or_path=tiny, tasks=tasks)
    assert main(["compare", str(path), "--revision", "v2"]) == 2
    assert f"--revision: {tiny} is a folder, which has none" in capsys.readouterr().err


def test_runs_are_known_by_the_weights_of_the_model(tiny, pairs, tmp_path):
    """A model that has moved is the same one; one that has changed in its place is not."""
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)

    def names(model):
        tasks = {"sums": {"dataset": [pairs], "train_rows": 2, "test_rows": 2}}
        tasks["sums"]["validation_rows"] = 2
        out = str(tmp_path / "out")
        path = write(tmp_path, model_name_or_path=str(model), tasks=tasks, output_dir=out)
        return [cell.folder.name for cell in prepare(read_experiment(path))]

    before = names(folder)
    assert names(shutil.copytree(folder, tmp_path / "moved")) == before
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, folder / "model.safetensors")
    assert not set(names(folder)) & set(before)


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        (None, 0, [None, None, None]),
        (None, 1, [None, None, None]),
        (None, 2, ["0", "1", "0"]),
        ("4,7", 2, ["4", "7", "4"]),
    ],
)
def test_a_gpu_a_worker(monkeypatch, visible, count, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert devices(3) == expected


def test_runs_are_told_as_they_end(tmp_path, monkeypatch):
    """The second one ends first; each worker's device is its own while it runs."""
    folders, seen = [tmp_path / "slow", tmp_path / "quick"], {}
    slow_may_end = threading.Event()

    def run_one(folder, threads, device):
        seen[folder.name] = device
        if folder.name == "slow":
            slow_may_end.wait(10)
        return 0

    monkeypatch.setattr("depthmix.compare.spread.run_one", run_one)
    monkeypatch.setattr("depthmix.compare.spread.devices", lambda workers: ["0", "1"])
    ended = []
    for folder, _ in run_here(folders, 2):
        ended.append(folder.name)
        slow_may_end.set()
    assert ended == ["quick", "slow"]
    assert sorted(seen.values()) == ["0", "1"]


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


@pytest.mark.parametrize(
    ("split", "where"),
    [("test", "the task's validation rows"), ("validation", "the rows scored here")],
)
def test_a_method_may_be_calibrated(tiny, pairs, tmp_path, capsys, split, where):
    path = write(
        tmp_path,
        model_name_or_path=tiny,
        output_dir=str(tmp_path / "out"),
        seeds=[1],
        split=split,
        defaults={"learning_rate": 1e-2, "num_train_epochs": 8},
        methods={"lora": {"mode": False}, "lora+temperature": {"mode": False, "calibrate": True}},
        tasks={"sums": {"dataset": [pairs], "train_rows": 4, "validation_rows": 3, "test_rows": 3}},
    )
    assert main(["compare", str(path)]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    plain, calibrated = results["runs"]
    assert plain["temperature"] == 1.0 != calibrated["temperature"]
    assert plain["accuracy"] == calibrated["accuracy"]
    assert plain["loss"] != calibrated["loss"]
    if split == "validation":
        assert calibrated["loss"] < plain["loss"]
    rows = next((tmp_path / "out/runs").glob("sums-lora+temperature*/calibrate.jsonl"))
    scored = rows.with_name("score.jsonl").read_text()
    assert (rows.read_text() == scored) == (split == "validation")
    sums = plain["reliability"]
    error = sum(abs(c - r) for c, r in zip(sums["confidence"], sums["right"], strict=True))
    assert plain["ece"] == pytest.approx(error / sum(sums["counts"]))
    text = (tmp_path / "out/results.md").read_text()
    assert f"fitted on {where}" in text
    assert f"| {plain['ece']:.3f} |" in text
    printed = capsys.readouterr().out.partition("figures: ")[0]
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed


def test_results_from_before_calibration_are_still_reported(tmp_path):
    run = {"task": "t", "method": "lora", "seed": 1, "split": "test", "loss": 1.0, "accuracy": 0.5}
    run |= {"trainable_parameters": 3, "seconds": 1.0, "peak_bytes": 1, "loss_curve": [[1, 2.0]]}
    results = {"runs": [{**run, "gate": []}], "differences": []}
    assert "| 1.0000 |" in markdown(results, "p.png")
    plot(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()


def test_rewards_are_drawn_where_there_are_any(tmp_path):
    run = {"task": "t", "seed": 1, "loss": 1.0, "accuracy": 0.5, "trainable_parameters": 3}
    runs = [
        {**run, "method": "sft", "loss_curve": [[1, 2.0]]},
        {**run, "method": "grpo", "loss_curve": [], "reward_curve": [[1, 0.2], [2, 0.4]]},
    ]
    axes = Figure().subplots()
    _plot_curves(axes, runs, looks(["sft", "grpo"]))
    assert [line.get_ydata().tolist() for line in axes.lines] == [[], [0.2, 0.4]]
    assert axes.get_title() == "reward in training"


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
    said = capsys.readouterr()
    assert "failed: sums, wrong, seed 1: exit status 1: k = 99, but" in said.err
    assert "sums, lora, seed 1: loss " in said.out
    log = next(Path(tmp_path / "out").rglob("sums-wrong*/log.txt")).read_text()
    assert "k = 99" in log
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [run["method"] for run in results["runs"]] == ["lora"]


def test_many_processes_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["compare", str(write(tmp_path))]) == 2
    assert "starts its runs itself" in capsys.readouterr().err
