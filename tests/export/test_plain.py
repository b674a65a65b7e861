"""Plain weights: what every engine loads, with the mixture left out or distilled into them."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import depthmix
from depthmix.carry.saved_run import SavedRun
from depthmix.cli import main
from depthmix.errors import TrainingError
from depthmix.export.plain import cost, distil
from depthmix.inference.loading import load_tuned
from models import perturb, tiny_model

LABELS = torch.tensor([[-100, -100, 7, 8, 9], [-100, 11, 12, -100, -100]])
BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 0, 0]]),
    "attention_mask": (LABELS != -100).long() | torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "labels": LABELS,
}


@pytest.fixture
def pair():
    """A tuned model with a mixture that matters, and a copy without it."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    teacher = depthmix.attach(tiny_model("llama"), depthmix.MoDEConfig(k=2), lora).eval()
    perturb(teacher.get_base_model().depthmix.modules_to_save["default"])
    return teacher, depthmix.detach(copy.deepcopy(teacher))


def test_the_cost_is_counted_on_supervised_tokens(pair):
    teacher, student = pair
    with torch.no_grad():
        inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
        ours, wanted = student(**inputs).logits, teacher(**inputs).logits
    # The positions in front of the supervised tokens: three of one row, two of the other.
    ours = torch.cat([ours[0, 1:4], ours[1, 0:2]])
    wanted = torch.cat([wanted[0, 1:4], wanted[1, 0:2]])
    labels = torch.tensor([7, 8, 9, 11, 12])
    found = cost(student, teacher, [BATCH])
    assert found.loss == pytest.approx(F.cross_entropy(ours, labels).item(), rel=1e-5)
    assert found.accuracy == pytest.approx((ours.argmax(-1) == labels).float().mean().item())
    agreeing = ours.argmax(-1) == wanted.argmax(-1)
    assert found.agreement == pytest.approx(agreeing.float().mean().item())
    assert cost(teacher, teacher, [BATCH]).agreement == 1.0


def test_distilling_brings_a_model_to_its_mixture(pair):
    teacher, student = pair
    before = {name: p.clone() for name, p in teacher.named_parameters()}

    def gap():
        with torch.no_grad():
            ours, wanted = (
                m(BATCH["input_ids"]).logits.log_softmax(-1) for m in (student, teacher)
            )
        return F.kl_div(ours[0], wanted[0], log_target=True, reduction="batchmean").item()

    first = gap()
    distil(student, teacher, [BATCH] * 40, learning_rate=1e-2)
    assert gap() < 0.5 * first
    assert not student.training
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())


def test_there_is_something_to_tune(pair):
    teacher, student = pair
    with pytest.raises(TrainingError, match="nothing of the model is trainable"):
        distil(student.requires_grad_(False), teacher, [BATCH], 1e-3)


@pytest.fixture(scope="module")
def run(tiny, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "tuned"
    flags = ["--model_name_or_path", tiny, "--dataset", rows, "--max_steps", "2", "--k", "2"]
    assert main(["train", *flags, "--output_dir", str(folder)]) == 0
    return folder


def test_command(run, rows, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--plain"]) == 0
    assert "the mixture is left out; --dataset distils it first" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"auto_map", "depthmix"} & set(config)
    assert not SavedRun.find(str(out)).has_mode
    AutoTokenizer.from_pretrained(out)
    tuned, _ = load_tuned(str(run))
    plain = depthmix.detach(tuned).merge_and_unload()
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, plain(ids).logits)
    assert main(["generate", str(out), "--prompt", "What", "--max-new-tokens", "2"]) == 0


def test_command_with_rows(run, rows, tmp_path, capsys):
    argv = ["export", str(run), str(tmp_path / "out"), "--plain", "--dataset", rows]
    assert main([*argv, "--steps", "3", "--batch-size", "4"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^on 2 held-out rows +loss a token  accuracy  agreement$", told, re.MULTILINE)
    assert re.search(r"^mixture +\d\.\d+ +[\d.]+% +100\.0%$", told, re.MULTILINE)
    assert re.search(r"^distilled, 3 steps +\d\.\d+ +[\d.]+% +[\d.]+%$", told, re.MULTILINE)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_goes_wrong_is_one_line(run, rows, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["export", str(run), out, "--dataset", rows]) == 2
    assert "rows are for --plain" in capsys.readouterr().err
    few = tmp_path / "few.jsonl"
    few.write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    assert main(["export", str(run), out, "--plain", "--dataset", str(few)]) == 1
    assert "2 rows are too few: one in five is held out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
