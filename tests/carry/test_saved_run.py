"""`SavedRun`: what a folder, or a name on the hub, holds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import depthmix
from depthmix.carry.saved_run import Holds, SavedRun
from depthmix.cli import main
from depthmix.errors import CheckpointError, ConfigError, DepthmixError
from depthmix.export.folder import export_model
from depthmix.inference.loading import load_tuned
from depthmix.pretrained import Loading, load_base, load_saved


def train(tiny, rows, out, *flags):
    command = ["train", "--model_name_or_path", tiny, "--dataset", str(rows), "--output_dir", out]
    shape = ["--k", "2", "--max_steps", "4", "--save_steps", "2", "--disable_tqdm"]
    assert main([*command, *shape, "--learning_rate", "1e-2", *flags]) == 0
    return out


@pytest.fixture(scope="module")
def run(tiny, rows, tmp_path_factory):
    """Folder of a LoRA with MoDE and its checkpoints."""
    return train(tiny, rows, str(tmp_path_factory.mktemp("runs") / "run"))


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 12).unsqueeze(0)).logits


def test_an_adapter(tiny, run):
    saved = SavedRun.find(run)
    assert saved.holds is Holds.ADAPTER
    assert saved.has_mode
    assert saved.base == tiny
    assert [path.name for path in saved.checkpoints] == ["checkpoint-2", "checkpoint-4"]


def test_a_base_model(tiny):
    saved = SavedRun.find(tiny)
    assert saved.holds is Holds.MODEL
    assert not saved.has_mode
    assert saved.base == tiny
    assert saved.record.row_format is None


def test_a_whole_model_and_an_export(tiny, rows, tmp_path):
    out = train(tiny, rows, str(tmp_path / "full"), "--method", "full")
    saved = SavedRun.find(out)
    assert (saved.holds, saved.has_mode) == (Holds.MODEL, True)
    model, tokenizer = load_tuned(out)
    expected = logits(model)
    export_model(model, tokenizer, tmp_path / "exported")
    exported = SavedRun.find(str(tmp_path / "exported"))
    assert exported.holds is Holds.EXPORT
    torch.testing.assert_close(logits(load_saved(exported)), expected)


def test_a_checkpoint_has_the_record_of_its_run(run):
    whole, checkpoint = SavedRun.find(run), SavedRun.find(f"{run}/checkpoint-2")
    assert checkpoint.holds is Holds.ADAPTER
    assert checkpoint.record == whole.record
    assert checkpoint.record.row_format == "prompt_completion"


def test_an_unfinished_run_names_its_last_checkpoint(copied):
    (copied / "adapter_config.json").unlink()
    (copied / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(CheckpointError, match=r"unfinished run; use its last checkpoint, .*-2,"):
        SavedRun.find(str(copied))
    assert SavedRun(str(copied), copied).holds is Holds.UNFINISHED


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothere", "no such folder, and no such model in the cache of the hub"),
        ("some/body@v2", "no such model at revision v2 in the cache"),
        ("./nothere", r"^model \./nothere: there is no such folder$"),
        ("a b", "no such model on the hub"),
        ("{empty}", "holds no model: neither adapter_config.json nor config.json"),
        ("{file}", "a file, not the folder of a model"),
    ],
)
def test_nothing_is_an_error(tmp_path, name, message):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    places = {"file": tmp_path / "file", "empty": tmp_path / "empty"}
    with pytest.raises(CheckpointError, match=message):
        SavedRun.find(name.format(**places))


@pytest.mark.parametrize("command", ["generate", "chat", "eval", "export", "info"])
@pytest.mark.parametrize("what", ["nothere", "unfinished"])
def test_no_command_answers_as_the_base(tiny, copied, tmp_path, capsys, command, what):
    (copied / "adapter_config.json").unlink()
    more = {
        "generate": ["--prompt", "x"],
        "eval": ["--tasks", "gsm8k=x.json"],
        "export": [str(tmp_path / "out")],
    }.get(command, [])
    target = str(copied) if what == "unfinished" else what
    assert main([command, target, "--model", tiny, *more]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert ("unfinished run" if what == "unfinished" else "no such folder") in error
    assert not (tmp_path / "out").exists()


def test_adapters_and_ensembles_are_no_base_models(tiny, rows, run, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=f"holds an adapter, .* its own is {tiny}"):
        load_base(run)
    full = train(tiny, rows, str(tmp_path / "full"), "--method", "full")
    with pytest.raises(CheckpointError, match="holds a model with MoDE"):
        load_base(full)
    for command in (["plan", run], ["bench", "--model", run]):
        assert main(command) == 1
        assert "holds an adapter" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "depthmix.yaml"]
)
@pytest.mark.parametrize("plain", [False, True], ids=["MoDE", "plain LoRA"])
def test_half_a_file_is_named(tiny, rows, copied, tmp_path, capsys, name, plain):
    if plain:
        copied = Path(train(tiny, rows, str(tmp_path / "plain"), "--no_mode"))
    text = (copied / name).read_bytes()
    (copied / name).write_bytes(text[: len(text) // 3] + (b'"' if name == "depthmix.yaml" else b""))
    capsys.readouterr()
    assert main(["generate", str(copied), "--prompt", "x"]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert str(copied / name) in error[-1]


def test_an_adapter_of_another_size_is_one_line(tiny, rows, tmp_path, capsys):
    plain = train(tiny, rows, str(tmp_path / "plain"), "--no_mode")
    path = Path(plain) / "adapter_model.safetensors"
    save_file({name: torch.zeros(3, 3) for name in load_file(path)}, path)
    assert main(["generate", plain, "--prompt", "x"]) == 1
    assert "the adapter does not go onto" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_a_base_that_is_gone_is_named(tiny, rows, tmp_path, capsys):
    base = shutil.copytree(tiny, tmp_path / "base")
    out = train(str(base), rows, str(tmp_path / "out"))
    base.rename(tmp_path / "moved")
    prompt = ["--prompt", "x", "--max-new-tokens", "1"]
    assert main(["generate", out, *prompt]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{out}: its base model was the folder {base}, which is not there" in error
    assert main(["generate", out, "--model", str(tmp_path / "moved"), *prompt]) == 0


def test_a_lost_ensemble_is_not_a_plain_adapter(copied, capsys):
    path = copied / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(path).items() if "depthmix" not in n}, path)
    assert main(["generate", str(copied), "--prompt", "x"]) == 1
    assert "no MoDE in this checkpoint" in capsys.readouterr().err.splitlines()[-1]


def test_the_digest_follows_the_weights_wherever_they_lie(tiny, run, copied, tmp_path):
    digest = SavedRun.find(run).digest()
    assert SavedRun.find(str(copied)).digest() == digest
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    assert SavedRun.find(str(copied)).digest(str(base)) == digest
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert SavedRun.find(str(copied)).digest(str(base)) != digest
    assert SavedRun.find(f"{run}/checkpoint-2").digest() != digest


# From the hub: a cache as huggingface_hub lays it out, since tests have no network


@pytest.fixture
def hub(tiny, run, tmp_path, monkeypatch):
    """A cache that holds `some/adapter` at two revisions, and `some/base`."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def put(name, folder, commit, *refs):
        place = cache / f"models--{name.replace('/', '--')}"
        shutil.copytree(
            folder, place / "snapshots" / commit, ignore=shutil.ignore_patterns("checkpoint-*")
        )
        (place / "refs").mkdir(exist_ok=True)
        for ref in refs:
            (place / "refs" / ref).write_text(commit)
        return place / "snapshots" / commit

    put("some/base", tiny, "c" * 40, "main")
    for folder, commit, ref in ((run, "a" * 40, "main"), (f"{run}/checkpoint-2", "b" * 40, "v1")):
        config = put("some/adapter", folder, commit, ref) / "adapter_config.json"
        values = json.loads(config.read_text()) | {"base_model_name_or_path": "some/base"}
        config.write_text(json.dumps(values))
    return cache


@pytest.mark.filterwarnings("ignore:Could not find a config file in some/base")  # PEFT's, offline
def test_an_adapter_from_the_hub_by_name_and_revision(hub, run):
    for name, folder, commit in (
        ("some/adapter", run, "a" * 40),
        ("some/adapter@v1", f"{run}/checkpoint-2", "b" * 40),
        (f"some/adapter@{'b' * 40}", f"{run}/checkpoint-2", "b" * 40),
    ):
        saved = SavedRun.find(name)
        assert (saved.holds, saved.commit, saved.base) == (Holds.ADAPTER, commit, "some/base")
        torch.testing.assert_close(logits(load_tuned(name)[0]), logits(load_tuned(folder)[0]))
    assert SavedRun.find("some/adapter").digest() != SavedRun.find("some/adapter@v1").digest()
    assert SavedRun.find("some/adapter").record.row_format == "prompt_completion"
    with pytest.raises(CheckpointError, match="at revision v9"):
        SavedRun.find("some/adapter@v9")


@pytest.mark.filterwarnings("ignore:Could not find a config file in some/base")
@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_load_takes_names_on_the_hub(hub, tiny, run):
    def loaded(*where, **options):
        base = AutoModelForCausalLM.from_pretrained(tiny)
        return logits(depthmix.load(base, *where, **options).eval())

    torch.testing.assert_close(loaded("some/adapter"), loaded(run))
    torch.testing.assert_close(loaded("some/adapter", revision="v1"), loaded(f"{run}/checkpoint-2"))


def test_a_whole_model_on_the_hub_has_one_revision(hub, tiny, capsys):
    (hub / "models--some--base" / "refs" / "v2").write_text("c" * 40)
    prompt = ["--prompt", "x", "--max-new-tokens", "1"]
    assert main(["generate", "some/base", "--revision", "v2", *prompt]) == 0
    assert main(["generate", "some/base@v2", *prompt]) == 0
    capsys.readouterr()
    for target, revision, message in (
        ("some/base", "v3", "no such model at revision v3"),
        ("some/base@v2", "v2", "--revision: some/base@v2 names one already"),
        (tiny, "v2", "is a folder, which has none"),
    ):
        assert main(["generate", target, "--revision", revision, *prompt]) in (1, 2)
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_record_from_the_hub_is_no_permission_to_run_code(hub, run):
    folder = SavedRun.find("some/adapter").folder
    path = folder / "depthmix_run.json"
    facts = json.loads(path.read_text())
    facts["base"] |= {"name": "some/base", "trust_remote_code": True, "dtype": "bfloat16"}
    path.write_text(json.dumps(facts))
    from depthmix import pretrained

    loading = pretrained._loading(SavedRun.find("some/adapter"), None, None)
    assert (loading.trust_remote_code, loading.dtype) == (None, "bfloat16")


# How a base model is loaded


def test_what_was_recorded_is_applied_and_overruled():
    base = {
        "name": "b",
        "revision": "r",
        "trust_remote_code": True,
        "dtype": "bfloat16",
        "quantization": {"load_in_4bit": True},
    }
    assert Loading().or_as_recorded(base, same_base=True) == Loading(
        "r", True, "bfloat16", None, {"load_in_4bit": True}
    )
    assert Loading().or_as_recorded(base, same_base=False) == Loading(
        None, None, "bfloat16", None, {"load_in_4bit": True}
    )
    given = Loading("s", False, "float32", False)
    assert given.or_as_recorded(base, same_base=True) == given


@pytest.mark.parametrize("flags", [[], ["--dtype", "float16"]])
def test_commands_load_the_base_as_training_did(tiny, rows, tmp_path, monkeypatch, flags):
    out = train(tiny, rows, str(tmp_path / "out"), "--dtype", "bfloat16")
    loaded = []
    from depthmix import pretrained

    load = pretrained._load_model

    def watched(name, **options):
        loaded.append(options["dtype"])
        return load(name, **options)

    monkeypatch.setattr(pretrained, "_load_model", watched)
    assert main(["generate", out, "--prompt", "x", "--max-new-tokens", "1", *flags]) == 0
    assert loaded == (["float16"] if flags else ["bfloat16"])


def test_foreign_code_in_an_export_is_not_run(run, tmp_path, capsys):
    model, tokenizer = load_tuned(run)
    export_model(model, tokenizer, tmp_path / "out")
    code = tmp_path / "out" / "modeling_depthmix.py"
    code.write_text(code.read_text() + f"\nopen({str(tmp_path / 'trap')!r}, 'w')\n")
    with pytest.raises(DepthmixError, match="not what this version of depthmix writes"):
        load_saved(SavedRun.find(str(tmp_path / "out")))
    assert not (tmp_path / "trap").exists()
    with pytest.raises(ConfigError, match="holds a whole model"):
        load_saved(SavedRun.find(str(tmp_path / "out")), base="x")
