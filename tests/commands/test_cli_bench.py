"""`depthmix bench` runs, and its counts are what they should be. No time is asserted."""

import json

import pytest
import torch

from depthmix.bench.batch import IGNORED, make_batch, real_lengths
from depthmix.bench.loss import Shape
from depthmix.cli import main
from depthmix.errors import ConfigError

ROWS, LONGEST, K = 2, 24, 3


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    options = ["--rows", ROWS, "--longest", LONGEST, "--k", K, "--repeats", 1, "--steps", 3]
    arguments = ["bench", "--model", tiny, "--parts", "step", "decode", "cache", *map(str, options)]
    files = ["--json", str(folder / "out.json"), "--plot", str(folder / "out.png")]
    assert main([*arguments, *files]) == 0
    assert (folder / "out.png").stat().st_size > 10_000
    return json.loads((folder / "out.json").read_text())


def test_states_that_each_method_projects(results):
    steps = {name: (row["projected"], row["pulled_back"]) for name, row in results["step"].items()}
    labels = make_batch(real_lengths(ROWS, LONGEST), 300, torch.device("cpu"))["labels"]
    all_tokens, supervised = labels.numel(), int((labels[:, 1:] != IGNORED).sum())
    sampled = round(0.25 * supervised)
    native = ROWS  # the model's own head projects one position a row
    assert steps["lora"] == (all_tokens, all_tokens)
    assert steps["lora+mode, naive"] == (K * all_tokens, K * all_tokens)
    mode = supervised + (K - 1) * sampled
    ours = supervised - sampled + K * sampled
    assert mode == ours
    assert steps["lora+mode"] == (ours + native, ours)
    assert steps["late-lora+mode"] == steps["mode"] == steps["lora+mode"]
    assert steps["half"] == steps["light"] == (supervised + native, supervised)
    assert steps["lora+mode, all distilled"] == (K * supervised + native, K * supervised)


def test_ratios_are_written_with_what_made_them(results):
    assert set(results["ratios"]) == {
        "step_vs_hf_lora",
        "step_vs_chunked_lora",
        "peak_vs_hf_lora",
        "decode_vs_merged",
        "prefill_vs_merged",
        "prefill_memory_vs_merged",
        *(f"{name}_cached_vs_lora" for name in ("half", "light", "late-lora+mode")),
        *(f"{name}_first_vs_uncached" for name in ("half", "light", "late-lora+mode")),
    }
    lora, ours = results["step"]["lora"], results["step"]["lora+mode"]
    assert results["ratios"]["step_vs_hf_lora"] == ours["seconds"] / lora["seconds"]
    assert results["made_by"]["versions"]["torch"]
    assert results["made_by"]["options"]["k"] == K


def test_loads_the_model_as_it_is_told(tiny, monkeypatch, capsys):
    seen = []

    def measure(setting, *_):
        seen.append(setting)
        raise ConfigError("enough")

    monkeypatch.setattr("depthmix.bench.training.measure_steps", measure)
    main(["bench", "--model", tiny, "--parts", "step", "--dtype", "bfloat16"])
    assert seen[0].load().dtype == torch.bfloat16
    assert main(["bench", "--model", tiny, "--revision", "main"]) == 2
    assert "--revision" in capsys.readouterr().err


def test_bytes_of_the_naive_loss():
    assert Shape(tokens=2, vocabulary=10, width=4, k=3).naive_bytes == 3 * 4 * 2 * 10 * 3


def test_unknown_part_is_refused(capsys):
    assert main(["bench", "--model", "x", "--parts", "speed"]) == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err
