"""Methods that begin where another one has ended: rewards after supervised training."""

import json
import re
from pathlib import Path

import pytest
import yaml

from depthmix.cli import main
from depthmix.compare.engine import Cell, prepare, run_all
from depthmix.compare.experiment import read_experiment
from depthmix.errors import ConfigError

SHORT = {"max_steps": 1, "learning_rate": 1e-2, "logging_steps": 1}
METHODS = {
    "sft": {**SHORT, "mode": False},
    "grpo": {
        **SHORT,
        **{"after": "sft", "objective": "grpo", "reward": "exact:completion", "mode": False},
        **{"num_generations": 2, "gradient_accumulation_steps": 1, "max_completion_length": 3},
    },
}
METHODS["grpo+mode"] = {**METHODS["grpo"], "mode": True, "k": 2, "distill_signed": True}


def write(tmp_path, model, rows, methods):
    path = tmp_path / "experiment.yaml"
    experiment = {
        "model_name_or_path": model,
        "output_dir": str(tmp_path / "out"),
        "baseline": "sft",
        "seeds": [1, 2],
        "methods": methods,
        "tasks": {
            "sums": {"dataset": [rows], "train_rows": 4, "validation_rows": 2, "test_rows": 3}
        },
    }
    path.write_text(yaml.safe_dump(experiment, sort_keys=False))
    return path


def test_rewards_go_on_from_the_adapter_of_the_same_seed(tiny, pairs, tmp_path):
    path = write(tmp_path, tiny, pairs, METHODS)
    assert main(["compare", str(path), "--workers", "2"]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    runs = {(run["method"], run["seed"]): run for run in results["runs"]}
    assert len(runs) == 6
    assert results["experiment"]["methods"]["grpo"]["after"] == "sft"
    assert results["experiment"]["methods"]["grpo+mode"]["distill_signed"] == "true"
    for seed in (1, 2):
        start = Path(runs["sft", seed]["folder"])
        for method in ("grpo", "grpo+mode"):
            run = runs[method, seed]
            assert [step for step, _ in run["reward_curve"]] == [1]
            assert run["loss_curve"] == []
            made = yaml.safe_load((Path(run["folder"]) / "tuned/depthmix.yaml").read_text())
            assert made["model_name_or_path"] == str(start / "tuned")
        assert runs["sft", seed]["loss_curve"]
        assert len(runs["grpo+mode", seed]["gate"]) == 2
        assert runs["grpo", seed]["gate"] == []
    assert "| grpo+mode |" in (tmp_path / "out/results.md").read_text()


def test_a_run_is_known_by_what_it_begins_with(tiny, pairs, tmp_path):
    def folders(methods):
        cells = prepare(read_experiment(write(tmp_path, tiny, pairs, methods)))
        return {(cell.method, cell.seed): cell.folder.name for cell in cells}

    before = folders(METHODS)
    other_start = folders({**METHODS, "sft": {**METHODS["sft"], "lora_r": 4}})
    other_end = folders({**METHODS, "grpo": {**METHODS["grpo"], "temperature": 0.5}})
    for seed in (1, 2):
        assert before["grpo", seed] != other_start["grpo", seed]
        assert before["sft", seed] == other_end["sft", seed]
        assert before["grpo", seed] != other_end["grpo", seed]
        assert before["grpo+mode", seed] == other_end["grpo+mode", seed]


def test_what_begins_with_a_failed_run_is_named(tmp_path):
    start = Cell("sums", "sft", 1, tmp_path / "sft")
    other = Cell("sums", "sft", 2, tmp_path / "other")
    cells = [
        start,
        other,
        *(Cell("sums", "grpo", c.seed, tmp_path / f"grpo{c.seed}", c) for c in (start, other)),
    ]
    for cell in cells:
        cell.folder.mkdir()
    waves = []

    def run(folders):
        waves.append([folder.name for folder in folders])
        for folder in folders:
            if folder.name == "sft":
                (folder / "log.txt").write_text("depthmix: error: no room\n")
                yield folder, 1
                continue
            metrics = {"loss": 1.0, "accuracy": 0.5, "seconds": 1.0}
            (folder / "result.json").write_text(json.dumps({"metrics": metrics}))
            yield folder, 0

    failed = run_all(cells, run)
    assert waves == [["sft", "other"], ["grpo2"]]
    assert [re.sub(r" \(see .*", "", line) for line in failed] == [
        "sums, sft, seed 1: exit status 1: no room",
        "sums, grpo, seed 1: not run, since sums, sft, seed 1, failed",
    ]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (
            {"sft": {}, "grpo": {"after": "lora"}},
            r"yaml:\d+: methods\.grpo\.after: 'lora' is none of the methods that stand before this "
            "one: sft",
        ),
        ({"sft": {"after": "sft"}}, r"methods\.sft\.after: .*before this one: there is none"),
        ({"sft": {}, "more": {"after": "sft"}}, r"methods\.more\.after: objective sft begins at"),
        ({"sft": {}, "dpo": {"objective": "dpo"}}, "method dpo: objective dpo needs pairs"),
        ({"sft": {}, "grpo": {"objective": "grpo"}}, "method grpo: reward is missing"),
    ],
)
def test_a_start_that_cannot_be_is_refused(tmp_path, methods, message):
    path = write(tmp_path, "m", "rows.jsonl", methods)
    with pytest.raises(ConfigError, match=message):
        prepare(read_experiment(path))
