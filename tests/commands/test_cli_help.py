"""The front of the command: help and wrong arguments, at once and on one line."""

import dataclasses
import subprocess
import sys

import pytest
from trl import ModelConfig, SFTConfig

from depthmix.cli import COMMANDS, main
from depthmix.commands.train_help import _TRL_TRAINING, LORA_HELP, with_defaults
from depthmix.commands.trl_defaults import trl_defaults

WITHOUT_TORCH = """
import sys
from depthmix.cli import main
status = main({argv!r})
heavy = {{"torch", "transformers", "trl", "peft", "datasets"}} & set(sys.modules)
assert not heavy, heavy
raise SystemExit(status)
"""


def run_without_torch(*argv):
    code = WITHOUT_TORCH.format(argv=list(argv))
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)


@pytest.mark.parametrize("argv", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_needs_no_torch(argv):
    done = run_without_torch(*argv)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: depthmix")
    assert "examples:" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["tran"], "unknown command 'tran'; commands are train, generate"),
        (["train", "--k", "0"], "--k must be an integer >= 1, not 0"),
        (["train", "none.yaml"], "none.yaml: No such file or directory"),
        (["generate", "out"], "one of the arguments --prompt --prompts-file is required"),
        (
            ["generate", "out", "--prompt", "x", "--topp", "1"],
            "--topp: no such option; did you mean",
        ),
        (["generate", "out", "--prompt", "x", "--top_p", "7"], "--top-p must be in (0, 1]"),
        (["generate", "out", "--prompt", "x", "--top-p", "7"], "--top-p must be in (0, 1]"),
        (["chat"], "the following arguments are required: MODEL"),
        (["chat", "out", "--temperature", "-1"], "--temperature must be >= 0"),
        (["chat", "out", "--max-new-tokens", "0"], "--max-new-tokens must be an integer >= 1"),
        (["info", "--k", "3"], "the model or the adapter comes first"),
    ],
)
def test_wrong_arguments_are_one_line_and_need_no_torch(argv, complaint):
    done = run_without_torch(*argv)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"depthmix: error: {complaint}")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("argv", [[], ["train"], ["info"]])
def test_no_arguments_show_the_help(argv, capsys):
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert "usage: depthmix" in shown.out + shown.err


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("depthmix 0.")


def test_module_runs_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "depthmix", "--help"], check=True, capture_output=True, text=True
    )
    assert "commands:" in done.stdout


def test_all_options_are_listed(capsys):
    assert main(["train", "--help-all"]) == 0
    shown = capsys.readouterr().out
    for name in ("adam_beta1", "lora_dropout", "distill_weight", "late_layers_only"):
        assert f"  {name}: " in shown


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("DEPTHMIX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="unknown command"):
        main(["tran"])


def test_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("depthmix.commands.info.run", interrupted)
    assert main(["info", "x"]) == 130
    assert capsys.readouterr().err == "depthmix: stopped\n"


def test_defaults_of_the_help_are_trls():
    """They are read from its source, without an import."""
    declared = {
        field.name: field.default
        for cls in (SFTConfig, ModelConfig)
        for field in dataclasses.fields(cls)
    }
    read = trl_defaults()
    for name in (*_TRL_TRAINING, *LORA_HELP, "dtype", "load_in_4bit", "adam_beta2"):
        if isinstance(declared[name], int | float | str | None):
            assert read[name] == declared[name], name
    assert f"Default: {declared['max_length']}." in with_defaults(_TRL_TRAINING)["max_length"]
    assert with_defaults(LORA_HELP)["lora_r"] == "Rank. Default: 16."
