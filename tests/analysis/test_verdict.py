"""The verdict on a run: each failure is found where it is made, and not elsewhere."""

import json

import numpy as np
import pytest

from depthmix.analysis.observations import Observations
from depthmix.analysis.training_log import TrainingLog
from depthmix.analysis.verdict import findings
from depthmix.carry.saved_run import SavedRun
from depthmix.errors import CheckpointError

N = 200


def make_seen(gate=(0.2, 0.8), spread=0.1, gain=0.2, late=(2, 3)):
    generator = np.random.default_rng(0)
    last = np.clip(gate[1] + spread * generator.normal(size=N), 0, 1)
    loss = np.full((N, 3), 1.0) + 0.05 * generator.normal(size=(N, 1))
    loss[:, 2] -= gain * (1 + 0.1 * generator.normal(size=N))
    return Observations(
        (2, 3),
        late,
        np.arange(N) // 5,
        np.arange(N) % 5,
        np.zeros(N, dtype=int),
        np.full(N, True),
        np.stack([1 - last, last], axis=1) if late else np.zeros((N, 0)),
        loss,
        np.zeros((N, 3, 3), dtype=int),
        np.full((N, 3, 3), 0.3),
    )


def make_log(distill=(4.0, 0.5), gradients=1.0, evaluations=(2.0, 1.0, 0.8)):
    steps = 20
    history = [
        {
            "step": step,
            "loss": 2.0,
            "grad_norm": gradients if step == 9 else 1.0,
            "distill_loss": distill[0] + (distill[1] - distill[0]) * step / steps,
            "router_weight/layer_3": 0.8,
        }
        for step in range(1, steps + 1)
    ]
    history += [{"step": i, "eval_loss": value} for i, value in enumerate(evaluations)]
    return TrainingLog.of([*history, {"step": steps, "train_runtime": 12.0, "train_loss": 1.0}])


def states(seen, log):
    return {finding.name: finding.state for finding in findings(seen, log)}


def test_a_healthy_run():
    found = findings(make_seen(), make_log())
    assert {finding.state for finding in found} == {"fine"}
    assert not any(finding.advice for finding in found)
    assert "12 s" in found[-1].figure


@pytest.mark.parametrize(
    ("seen", "log", "name"),
    [
        ({"gate": (0.005, 0.995), "spread": 0.001}, {}, "router collapsed"),
        ({"spread": 0.0001}, {}, "router collapsed"),
        ({}, {"distill": (4.0, 4.0)}, "late layers no better than before"),
        ({}, {"gradients": 50.0}, "unstable adaptation"),
        ({}, {"evaluations": (2.0, 1.0, 1.4)}, "unstable adaptation"),
        ({"gain": 0.0}, {}, "slower without gain"),
    ],
)
def test_each_failure_is_found_alone_and_has_advice(seen, log, name):
    found = findings(make_seen(**seen), make_log(**log))
    assert [finding.name for finding in found if finding.state == "look"] == [name]
    assert next(finding for finding in found if finding.name == name).advice


def test_without_a_log_what_needs_one_cannot_be_told():
    found = states(make_seen(), None)
    assert found["late layers no better than before"] == "unknown"
    assert found["unstable adaptation"] == "unknown"
    assert found["router collapsed"] == "fine"


def test_without_mode_only_stability_is_judged():
    assert list(states(make_seen(late=()), make_log())) == ["unstable adaptation"]


def test_the_log_is_that_of_the_run_or_of_its_last_checkpoint(tmp_path):
    run = SavedRun(str(tmp_path), tmp_path)
    assert TrainingLog.read(run) is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        history = {"log_history": [{"step": step, "loss": 1.0}]}
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(history))
    assert TrainingLog.read(run).curve("loss") == [(10, 1.0)]
    (tmp_path / "trainer_state.json").write_text('{"log_history": [{"step": 12, "eval_loss": 3}]}')
    log = TrainingLog.read(run)
    assert log.curve("loss", evaluation=True) == [(12, 3.0)]
    assert log.curve("loss") == []
    (tmp_path / "trainer_state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"trainer_state\.json"):
        TrainingLog.read(run)
