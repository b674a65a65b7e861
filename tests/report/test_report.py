"""`depthmix report`: what it writes, from a run of the command line to the page."""

import json
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest

from depthmix.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")

FLAGS = ["--generate", "1", "--max-new-tokens", "4", "--permutations", "199"]


@pytest.fixture(scope="module")
def run_folder(tiny, rows, tmp_path_factory):
    """A run with evaluations."""
    folder = str(tmp_path_factory.mktemp("runs") / "out")
    flags = ["--validation_split", "0.5", "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--max_steps", "6", "--logging_steps", "1", "--k", "2", "--disable_tqdm"]
    command = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--output_dir", folder]
    assert main([*command, *flags]) == 0
    return folder


@pytest.fixture(scope="module")
def written(run_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reports") / "report"
    assert main(["report", run_folder, "--output", str(folder), *FLAGS]) == 0
    return folder


def tables(folder):
    return json.loads((folder / "tables.json").read_text())


class Addresses(HTMLParser):
    """What elements name to be fetched or gone to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "href")]


def test_the_page_needs_nothing_else(written):
    page = (written / "report.html").read_text()
    addresses = Addresses()
    addresses.feed(page)
    assert addresses.found
    assert all(address.startswith(("#", "data:")) for address in addresses.found)
    assert "@import" not in page.split("</style>")[0]
    assert len(page) < 2_000_000


def test_every_figure_is_a_picture_and_its_specification(written):
    pictures = sorted((written / "figures").glob("*.png"))
    names = {path.stem for path in pictures}
    assert {"loss", "router-weights", "layers", "agreement", "calibration", "entropy"} <= names
    assert {"routing-part", "routing-token-class"} <= names
    for path in pictures:
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", content[16:20])[0] > 800
        specification = json.loads(path.with_suffix(".json").read_text())
        assert "vega-lite" in specification["$schema"]


def test_tables_hold_what_the_page_shows(written):
    found = tables(written)
    assert found["late_layers"] == [2, 3]
    assert [line["name"] for line in found["layers"]] == ["layer 2", "layer 3", "model"]
    assert {finding["name"] for finding in found["findings"]} == {
        "router collapsed",
        "late layers no better than before",
        "unstable adaptation",
        "slower without gain",
    }
    steps = {point["step"] for point in found["log"] if point["evaluation"]}
    assert steps == {2, 4, 6}
    assert "depthmix train" in found["record"]["command"] or found["record"]["command"]
    weights = [line["weight"] for line in found["routing"] if line["group"] == "digit"]
    assert sum(weights[:2]) == pytest.approx(1, abs=1e-4)


def test_other_rows_and_all_layers(run_folder, rows, tmp_path, capsys):
    gym = "reasoning_gym:chain_sum?size=6&seed=3"
    flags = ["--all-layers", "--rows", "8", "--output", str(tmp_path)]
    assert main(["report", run_folder, *FLAGS, rows, *flags, gym]) == 0
    assert "router collapsed" in capsys.readouterr().out
    found = tables(tmp_path)
    assert [line["name"] for line in found["layers"]] == [
        *(f"layer {n}" for n in range(4)),
        "model",
    ]
    assert {line["group"] for line in found["routing"] if line["grouping"] == "data set"} == {
        "train",
        "chain_sum",
    }
    assert "train: the first 8 of 12 rows (--rows)" in found["left_out"]


def test_a_checkpoint_has_the_rows_and_the_log_of_its_run(run_folder, tmp_path):
    checkpoint = f"{run_folder}/checkpoint-6"
    assert main(["report", checkpoint, "--output", str(tmp_path), *FLAGS]) == 0
    assert tables(tmp_path)["log"]


def test_a_run_without_mode_has_its_layers_and_no_routing(tiny, rows, tmp_path):
    flags = ["--no_mode", "--max_steps", "2", "--disable_tqdm", "--output_dir", str(tmp_path / "o")]
    assert main(["train", "--model_name_or_path", tiny, "--dataset", rows, *flags]) == 0
    assert main(["report", str(tmp_path / "o"), rows, *FLAGS]) == 0
    found = tables(tmp_path / "o" / "report")
    assert found["routing"] == []
    assert any("no routing" in note for note in found["left_out"])
    page = (tmp_path / "o" / "report" / "report.html").read_text()
    assert 'id="routing"' not in page
    assert 'id="layers"' in page


def test_what_cannot_be_reported_is_refused(run_folder, tiny, rows, tmp_path, capsys):
    def error(*argv):
        assert main(["report", *argv]) != 0
        return capsys.readouterr().err

    assert "give held-out data" in error(tiny)
    assert "no such folder" in error("nowhere", rows)
    assert main(["export", run_folder, str(tmp_path / "e")]) == 0
    assert "an export" in error(str(tmp_path / "e"), rows)
    assert not (tmp_path / "e" / "report").exists()


def test_evaluation_rows_that_have_changed_are_refused(tiny, rows, tmp_path, capsys):
    held_out = tmp_path / "held.jsonl"
    lines = Path(rows).read_text().splitlines()
    held_out.write_text("\n".join(lines[:4]))
    flags = ["--eval_dataset", str(held_out), "--max_steps", "2", "--disable_tqdm", "--k", "2"]
    out = str(tmp_path / "o")
    command = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--output_dir", out]
    assert main([*command, *flags]) == 0
    held_out.write_text("\n".join(lines[1:5]))
    assert main(["report", out]) == 1
    assert "not what they were" in capsys.readouterr().err
    assert not (tmp_path / "o" / "report").exists()
