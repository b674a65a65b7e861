"""`depthmix info`: what is found, what would be trained, what a folder holds."""

import json

import pytest

from depthmix.cli import main


def info(capsys, *argv):
    assert main(["info", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_base_model(tiny, capsys):
    report = info(capsys, tiny, "--k", "2", "--lora_r", "4", "--lora_target_modules", "q_proj")
    assert report["modules"]["layers"] == "model.layers"
    assert report["modules"]["late layers"] == [2, 3]
    assert report["modules"]["final norm"] == "model.norm"
    assert report["modules"]["head"] == "lm_head"
    assert report["modules"]["after the head"] == "nothing"
    parts = report["parameters"]["parts"]
    d, k, r, layers = 32, 2, 4, 4
    assert parts == {
        "lora q_proj": layers * 2 * d * r,
        "MoDE norms and maps": k * d + 2 * k * d * 16,
        "MoDE router": k * d + k,
    }
    assert report["parameters"]["trainable"] == sum(parts.values())
    assert report["config"]["k"] == 2


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--method", "none"], {"MoDE norms and maps", "MoDE router"}),
        (["--no_mode", "--late_layers_only"], {"lora q_proj", "lora down_proj"}),
        (["--method", "prompt_tuning"], {"prompt", "MoDE router"}),
        (["--method", "ia3"], {"ia3 k_proj", "ia3 down_proj"}),
        (
            ["--method", "full"],
            {"embed_tokens", "q_proj", "norm", "lm_head", "MoDE norms and maps"},
        ),
    ],
)
def test_parts_of_methods(tiny, capsys, flags, parts):
    report = info(capsys, tiny, *flags)
    assert parts <= set(report["parameters"]["parts"])
    assert (report["saved_bytes"] is None) == ("full" in flags)


def test_an_adapter_as_planned_and_as_saved(tiny, rows, tmp_path, capsys):
    out = str(tmp_path / "out")
    command = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--output_dir", out]
    flags = ["--k", "2", "--lora_r", "4"]
    assert main([*command, *flags, "--max_steps", "1", "--disable_tqdm"]) == 0
    capsys.readouterr()
    planned, saved = info(capsys, tiny, *flags), info(capsys, out)
    assert saved["parameters"] == planned["parameters"]
    assert saved["config"] == planned["config"]
    size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert saved["saved_bytes"] == planned["saved_bytes"] == size
    assert main(["info", out, "--k", "3"]) == 2
    assert "is saved already" in capsys.readouterr().err


def test_budgets_side_by_side(tiny, capsys):
    """Of LoRA on all linear modules; the model has 4 layers, and its halves are alike."""
    report = info(capsys, tiny, "--k", "2")
    full, half, light = (report["budgets"][name] for name in ("full", "half", "light"))
    assert full["trained"] == info(capsys, tiny, "--no_mode")["parameters"]["trainable"]
    assert (half["trained"], half["share"]) == (full["trained"] / 2, 0.5)
    assert (light["trained"], light["rank"]) == (half["trained"] / 16, 1)
    assert (full["tuned_layers"], light["tuned_layers"]) == (4, 2)
    assert full["cached"] is None
    assert light["cached"] < light["step"] < full["step"] == 1


def test_tables(tiny, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["info", tiny]) == 0
    shown = capsys.readouterr().out
    for text in ("model.layers", "MoDE router", "of all parameters", "distill_weight", "light"):
        assert text in shown


@pytest.mark.parametrize(
    ("argv", "status", "complaint"),
    [
        (["{tiny}", "--k", "9"], 1, "k = 9, but LlamaForCausalLM has 4 layers"),
        (["{tiny}", "--kk", "9"], 2, "--kk: no such option; did you mean k?"),
        (["{tiny}", "--dataset", "x"], 2, "--dataset: has no meaning for depthmix info"),
        (["./none"], 1, "model ./none: there is no such folder"),
    ],
)
def test_what_goes_wrong_is_one_line(tiny, capsys, argv, status, complaint):
    assert main(["info", *(a.format(tiny=tiny) for a in argv)]) == status
    assert complaint in capsys.readouterr().err.splitlines()[-1]
