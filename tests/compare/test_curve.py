"""Scores after every epoch: what they say, and that training does not notice."""

import json
from pathlib import Path

import yaml

from depthmix.analysis.layers import score_rows
from depthmix.compare.curve import Curve
from depthmix.compare.run import run
from depthmix.train.arguments import parse
from depthmix.train.fit import fit


def options(tiny, pairs, folder, **changes):
    return {
        "model_name_or_path": tiny,
        "dataset": [pairs],
        "output_dir": str(folder / "tuned"),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lora_dropout": 0.1,
        "k": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }


def written(folder, values):
    folder.mkdir(exist_ok=True)
    (folder / "train.yaml").write_text(yaml.safe_dump(values))
    return folder


def some_of(pairs):
    return [json.loads(line) for line in Path(pairs).read_text().splitlines()[:3]]


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_point_an_epoch_and_the_last_one_is_the_result(tiny, pairs, tmp_path):
    folder = written(tmp_path / "run", options(tiny, pairs, tmp_path))
    rows = some_of(pairs)
    (folder / "score.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(folder) == 0
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    curve = metrics["curve"]
    assert [point["epoch"] for point in curve] == [1, 2, 3]
    for name in ("loss", "accuracy", "ece"):
        assert curve[-1][name] == metrics[name]
    assert len({point["loss"] for point in curve}) == 3
    seconds = [point["seconds"] for point in curve]
    assert 0 < seconds[0] < seconds[1] < seconds[2] == metrics["seconds"]
    assert metrics["peak_bytes"] > 0


def test_training_does_not_notice(tiny, pairs, tmp_path):
    """With dropout, and with the frozen half from the cache."""
    rows = some_of(pairs)
    for name, changes in {"dropout": {}, "cached": {"lora_dropout": 0, "budget": "half"}}.items():
        alone = written(tmp_path / f"{name}-alone", {})
        watched = written(tmp_path / f"{name}-watched", {})
        cache = {"cache_dir": str(tmp_path / "cache")}
        written(alone, options(tiny, pairs, alone, **changes, **cache))
        written(watched, options(tiny, pairs, watched, **changes, **cache))
        plain = fit(parse([str(alone / "train.yaml")]))
        curve = Curve(rows)
        followed = fit(parse([str(watched / "train.yaml")]), [curve])
        assert losses(followed) == losses(plain)
        assert len(curve.points) == 2  # the last one is added with the result
        scores = score_rows(followed.model, followed.processing_class, rows)
        assert scores.mean_loss != curve.points[-1]["loss"]
