"""The temperature against a grid, calibration error against its definition, and what is stored."""

import copy
import json
import math
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import depthmix
from depthmix.calibration import fit as fitting
from depthmix.calibration.fit import fit_calibration
from depthmix.calibration.reliability import BINS, Reliability
from depthmix.carry.saved_run import SavedRun
from depthmix.cli import main
from depthmix.errors import CheckpointError, DataError, DepthmixError
from depthmix.model.temperature import set_temperature, temperature_of
from depthmix.pretrained import load_saved
from models import ANATOMIES, attached, randomise, tiny_model, token_ids

IGNORED = -100


def sampled_rows(model, temperature=1.0, count=40):
    """Rows whose next tokens are drawn from the model's own predictions at a temperature."""
    ids = token_ids(count, 12)
    for t in range(5, 12):
        with torch.no_grad():
            logits = model(input_ids=ids[:, :t]).logits[:, -1].double() / temperature
        ids[:, t] = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    return [{"input_ids": row, "labels": [IGNORED] * 5 + row[5:]} for row in ids.tolist()]


def logits_of(model, rows, raw=False):
    """Logits and labels of the supervised tokens in fp64; raw: what the head itself gives."""
    given, logits, labels = [], [], []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _module, _args, output: given.append(output))
    for row in rows:
        with torch.no_grad():
            found = model(input_ids=torch.tensor([row["input_ids"]])).logits
        found = (given[-1] if raw else found)[0, :-1].double()
        wanted = torch.tensor(row["labels"][1:])
        logits.append(found[wanted != IGNORED])
        labels.append(wanted[wanted != IGNORED])
    handle.remove()
    return torch.cat(logits), torch.cat(labels)


def naive_error(confidence, right):
    total = 0.0
    for b in range(BINS):
        chosen = [
            (c, r) for c, r in zip(confidence, right, strict=True) if b / BINS < c <= (b + 1) / BINS
        ]
        if chosen:
            mean_c = sum(c for c, _ in chosen) / len(chosen)
            mean_r = sum(r for _, r in chosen) / len(chosen)
            total += len(chosen) * abs(mean_c - mean_r)
    return total / len(confidence)


def test_calibration_error_is_that_of_the_definition():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.001, 1, 500)
    right = generator.uniform(size=500) < confidence**2
    whole = Reliability.of(confidence, right)
    assert whole.error == pytest.approx(naive_error(confidence, right))
    parts = Reliability.of(confidence[:99], right[:99]) + Reliability.of(
        confidence[99:], right[99:]
    )
    assert parts.error == pytest.approx(whole.error)
    assert Reliability.from_dict(json.loads(json.dumps(whole.as_dict()))).error == whole.error
    assert Reliability().error == 0.0
    edges = Reliability.of([1 / BINS, 1.0, 0.0], [1, 1, 0])
    assert edges.counts.tolist() == [2, *[0] * (BINS - 2), 1]


@pytest.mark.parametrize("model_type", ["llama", "granite", "gemma2", "cohere2"])
@pytest.mark.parametrize("with_mode", [True, False])
def test_temperature_is_the_best_of_a_grid(model_type, with_mode, monkeypatch):
    monkeypatch.setattr(fitting, "TOKENS_AT_ONCE", 60)  # several batches
    monkeypatch.setattr(fitting, "CHUNK_BYTES", 4 * 97 * 7)  # several chunks
    model = tiny_model(model_type)
    model = attached(model, k=3) if with_mode else model
    rows = sampled_rows(model, temperature=1.6)
    found = fit_calibration(model, rows)
    raw, labels = logits_of(model, rows, raw=True)
    grid = np.exp(np.linspace(math.log(0.5), math.log(4), 700)).tolist()
    transform = ANATOMIES[model_type].transform
    losses = [F.cross_entropy(transform(raw / at), labels).item() for at in grid]
    best = grid[int(np.argmin(losses))]
    assert found.temperature == pytest.approx(best, rel=4e-3)
    assert found.tokens == len(labels)
    for figures, temperature in ((found.before, 1.0), (found.after, found.temperature)):
        set_temperature(model, temperature)
        logits, _ = logits_of(model, rows)
        assert figures.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
        confidence, chosen = logits.softmax(-1).max(-1)
        expected = naive_error(confidence.tolist(), (chosen == labels).tolist())
        assert figures.reliability.error == pytest.approx(expected, abs=1e-4)
    assert found.after.loss < found.before.loss


def test_a_calibrated_model_keeps_its_temperature_of_one():
    model = tiny_model("llama")
    found = fit_calibration(model, sampled_rows(model, count=300))
    assert found.temperature == pytest.approx(1.0, abs=0.05)  # some three standard errors
    assert found.before.reliability.error < 0.05


def test_the_likeliest_tokens_stay_and_so_does_the_model():
    model = attached(tiny_model("gemma2"), k=2)
    ids = token_ids(3, 9)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    set_temperature(model, 2.5)
    with torch.no_grad():
        after = model(input_ids=ids).logits
    assert not torch.allclose(before, after, atol=1e-2)
    assert torch.equal(before.argmax(-1), after.argmax(-1))
    fit_calibration(model, sampled_rows(model))
    assert temperature_of(model) == 2.5
    set_temperature(model, 1.0)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def test_copies_and_merged_models_keep_it():
    lora = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    lora.init_lora_weights = False
    model = depthmix.attach(tiny_model("llama"), depthmix.MoDEConfig(k=2), lora).eval()
    ids = token_ids(2, 7)
    set_temperature(model, 1.7)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        assert torch.equal(copied(input_ids=ids).logits, expected)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        assert temperature_of(merged) == 1.7
        set_temperature(merged, 1.0)
        plain = merged(input_ids=ids).logits
    torch.testing.assert_close(plain / 1.7, expected, atol=1e-4, rtol=1e-4)


def test_training_does_not_see_the_temperature():
    model = tiny_model("llama").train()
    inputs = {"input_ids": token_ids(2, 8), "labels": token_ids(2, 8)}
    before = model(**inputs).loss
    set_temperature(model, 3.0)
    assert torch.equal(model(**inputs).loss, before)


def test_a_head_with_a_bias_is_refused():
    model = randomise(tiny_model("phi")).eval()
    with pytest.raises(DepthmixError, match="PhiForCausalLM has a bias behind its head"):
        fit_calibration(model, [{"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]}])
    with pytest.raises(DepthmixError, match="bias"):
        set_temperature(model, 2.0)


def test_rows_that_tell_nothing_are_refused():
    model = tiny_model("llama")
    with pytest.raises(DataError, match="no token is supervised"):
        fit_calibration(model, [{"input_ids": [5, 6], "labels": [IGNORED, IGNORED]}])
    ids = token_ids(1, 6)
    for t in range(2, 6):
        with torch.no_grad():
            ids[:, t] = model(input_ids=ids[:, :t]).logits[:, -1].argmax(-1)
    row = ids[0].tolist()
    with pytest.raises(DataError, match="no temperature is best"):
        fit_calibration(model, [{"input_ids": row, "labels": [IGNORED] * 2 + row[2:]}])


# A run


@pytest.fixture(scope="session")
def calibrated(tiny, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "out"
    flags = ["--max_steps", "6", "--learning_rate", "1e-2", "--disable_tqdm", "--k", "2"]
    flags += ["--validation_split", "0.4", "--calibrate", "--per_device_train_batch_size", "4"]
    command = ["train", "--model_name_or_path", tiny, "--dataset", rows]
    assert main([*command, "--output_dir", str(folder), *flags]) == 0
    return folder


def stored(folder):
    return json.loads((folder / "depthmix_calibration.json").read_text())


def test_training_stores_a_temperature_that_loading_applies(calibrated):
    facts = stored(calibrated)
    run = SavedRun.find(str(calibrated))
    assert run.temperature == facts["temperature"] != 1.0
    assert facts["after"]["loss"] < facts["before"]["loss"]
    assert facts["rows"]["rows"] == 5
    assert {"command", "versions", "tokens", "weights"} <= facts.keys()
    assert temperature_of(load_saved(run)) == facts["temperature"]
    assert temperature_of(load_saved(run, calibrated=False)) == 1.0


def test_command_fits_what_training_fitted(calibrated, rows, tmp_path, capsys):
    folder, picture = tmp_path / "again", tmp_path / "r.png"
    shutil.copytree(calibrated, folder)
    lines = Path(rows).read_text().splitlines()
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(lines[:5]))
    assert main(["calibrate", str(folder), str(held_out), "--plot", str(picture)]) == 0
    assert capsys.readouterr().out.startswith("temperature ")
    facts = stored(folder)
    assert facts["rows"]["rows"] == 5
    assert picture.read_bytes().startswith(b"\x89PNG")
    model = load_saved(SavedRun.find(str(folder)), calibrated=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line) for line in lines[:5]]
    encoded = []
    for row in texts:
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"] + [tokenizer.eos_token_id]
        encoded.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    logits, labels = logits_of(model, encoded)
    assert facts["before"]["loss"] == pytest.approx(
        F.cross_entropy(logits, labels).item(), rel=1e-4
    )
    at = F.cross_entropy(logits / facts["temperature"], labels).item()
    assert facts["after"]["loss"] == pytest.approx(at, rel=1e-4)


def test_a_temperature_of_other_weights_is_refused(calibrated, adapter_of, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(calibrated, folder)
    shutil.copy(adapter_of / "adapter_model.safetensors", folder)
    with pytest.raises(CheckpointError, match="fitted to other weights"):
        load_saved(SavedRun.find(str(folder)))


@pytest.fixture
def adapter_of(train, tmp_path):
    assert train("--max_steps", "1", output="other") == 0
    return tmp_path / "other"


def test_broken_file_is_one_line(calibrated, tmp_path, capsys):
    folder = tmp_path / "broken"
    shutil.copytree(calibrated, folder)
    (folder / "depthmix_calibration.json").write_text("{}")
    assert main(["generate", str(folder), "--prompt", "x"]) == 1
    assert "depthmix_calibration.json: not whole" in capsys.readouterr().err


def test_greedy_replies_are_the_same(calibrated, tmp_path, capsys):
    plain = tmp_path / "plain"
    shutil.copytree(calibrated, plain)
    (plain / "depthmix_calibration.json").unlink()
    replies = []
    for folder in (calibrated, plain):
        flags = ["--prompt", "What is 3 + 4?", "--max-new-tokens", "12"]
        assert main(["generate", str(folder), *flags]) == 0
        replies.append(capsys.readouterr().out)
    assert replies[0] == replies[1]


def test_a_run_that_no_temperature_fits_is_kept(train, tmp_path, monkeypatch, capsys):
    def refuse(*_args):
        raise DataError("no temperature is best")

    monkeypatch.setattr("depthmix.train.calibrate.fit_calibration", refuse)
    assert train("--max_steps", "1", "--validation_split", "0.4", "--calibrate") == 0
    assert "note: not calibrated: no temperature is best" in capsys.readouterr().out
    assert SavedRun.find(str(tmp_path / "out")).temperature == 1.0


def test_an_export_has_the_temperature(calibrated, tmp_path):
    assert main(["export", str(calibrated), str(tmp_path / "exported")]) == 0
    ids = torch.arange(5, 15)[None]
    models = [load_saved(SavedRun.find(str(f))) for f in (calibrated, tmp_path / "exported")]
    with torch.no_grad():
        logits = [model.eval()(input_ids=ids).logits for model in models]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_overwriting_a_run_takes_its_temperature_away(train, tmp_path):
    flags = ("--max_steps", "1", "--validation_split", "0.4")
    assert train(*flags, "--calibrate") == 0
    assert train(*flags, "--overwrite") == 0
    assert not (tmp_path / "out/depthmix_calibration.json").exists()


@pytest.mark.parametrize("method", ["full", "prompt_tuning", "none"])
def test_every_kind_of_run_can_be_calibrated(train, tmp_path, method):
    flags = ("--max_steps", "8", "--learning_rate", "1e-2", "--method", method)
    assert train(*flags, "--validation_split", "0.4", "--calibrate") == 0
    run = SavedRun.find(str(tmp_path / "out"))
    assert temperature_of(load_saved(run)) == stored(tmp_path / "out")["temperature"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--calibrate"], "calibrate needs rows that are not trained on"),
    ],
)
def test_training_without_held_out_rows_is_refused(train, capsys, command, message):
    assert train(*command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output_dir", "x"], "--output_dir: not an option of calibrate"),
        (["--supervice", "all"], "supervice: no such option; did you mean supervise"),
    ],
)
def test_wrong_options_are_one_line(calibrated, rows, capsys, flags, message):
    assert main(["calibrate", str(calibrated), rows, *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.real
def test_greedy_tokens_of_the_real_model_stay(real_model_folder):
    model = AutoModelForCausalLM.from_pretrained(real_model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(real_model_folder)
    inputs = tokenizer("Tom has 3 apples and buys 4 more. Now he has", return_tensors="pt")
    options = {"max_new_tokens": 24, "do_sample": False}
    expected = model.generate(**inputs, **options)
    for temperature in (0.7, 1.37, 3.0):
        set_temperature(model, temperature)
        assert torch.equal(model.generate(**inputs, **options), expected)
