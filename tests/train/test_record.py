"""What a run writes down of itself, and its model card."""

import json

import pytest
import yaml
from datasets import Dataset, concatenate_datasets

from depthmix.carry.groups import NORM_LR, ROUTER_LR
from depthmix.cli import main
from depthmix.train.arguments import parse
from depthmix.train.fit import fit
from depthmix.train.record import digest_of


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def run(tiny, rows, out, *flags):
    command = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--output_dir", str(out)]
    assert main([*command, "--max_steps", "1", "--disable_tqdm", *flags]) == 0
    return json.loads((out / "depthmix_run.json").read_text())


def test_the_record_has_what_was_not_said_as_well(tiny, rows, out):
    facts = run(tiny, rows, out, "--hub_token", "secret")
    options = facts["options"]
    assert options["seed"] == 42
    assert options["lora_alpha"] == 32
    assert options["router_learning_rate"] == ROUTER_LR
    assert options["norm_learning_rate"] == NORM_LR
    assert options["dataset"] == [rows]
    assert options["k"] == 3
    assert facts["base"] == {
        "name": tiny,
        "local": True,
        "revision": None,
        "trust_remote_code": False,
        "dtype": "float32",
        "quantization": None,
    }
    assert facts["data"]["train"]["rows"] == 12
    assert facts["data"]["eval"] is None
    assert {"depthmix", "torch", "trl"} <= set(facts["versions"])
    assert facts["command"]
    for name in ("depthmix.yaml", "depthmix_run.json"):
        assert "secret" not in (out / name).read_text()
    assert yaml.safe_load((out / "depthmix.yaml").read_text())["dataset_format"]


def test_rates_are_recorded_as_they_are(tiny, rows, out):
    options = run(tiny, rows, out, "--router_learning_rate", "0.5")["options"]
    assert (options["router_learning_rate"], options["norm_learning_rate"]) == (0.5, NORM_LR)


def test_without_mode_there_are_no_rates_of_its_own(tiny, rows, out):
    assert run(tiny, rows, out, "--no_mode")["options"]["router_learning_rate"] is None


def test_an_overwritten_run_leaves_no_record(tiny, rows, out):
    first = run(tiny, rows, out)
    second = run(tiny, rows, out, "--overwrite", "--seed", "7")
    assert (first["options"]["seed"], second["options"]["seed"]) == (42, 7)
    assert first["data"] == second["data"]


@pytest.mark.parametrize("flags", [[], ["--no_mode"]])
def test_the_card_names_a_local_base(tiny, rows, out, flags):
    run(tiny, rows, out, *flags)
    card = (out / "README.md").read_text()
    assert "[None]" not in card
    assert '"text-generation", model="out"' in card
    assert "fine-tuned version of `tiny`, a local model" in card


def test_the_card_of_a_run_that_is_not_finished_names_it_too(tiny, rows, out):
    command = ["--model_name_or_path", tiny, "--dataset", rows, "--output_dir", str(out)]
    fit(parse([*command, "--max_steps", "1"]))  # with its checkpoint, and not saved
    card = (out / "README.md").read_text()
    assert "[None]" not in card
    assert '"text-generation", model="out"' in card
    assert "fine-tuned version of `tiny`, a local model" in card
    assert "Mixture-of-Depths Ensemble" in card


def test_a_digest_is_of_rows_and_not_of_how_they_lie():
    rows = [{"a": [i, i + 1], "b": f"text {i}" if i else None} for i in range(9)]
    whole = Dataset.from_list(rows)
    parts = concatenate_datasets([Dataset.from_list(rows[:4]), Dataset.from_list(rows[4:])])
    backwards = Dataset.from_list(rows[::-1]).select(range(8, -1, -1))
    assert digest_of(whole) == digest_of(parts) == digest_of(backwards)
    assert digest_of(whole) != digest_of(Dataset.from_list(rows[::-1]))
    assert digest_of(whole) != digest_of(whole.select(range(8)))
