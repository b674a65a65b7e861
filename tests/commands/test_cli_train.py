"""`depthmix train`: from a data file to a saved adapter, stopped and continued on the way."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import depthmix
from command_fixtures import CHAT_TEMPLATE
from depthmix.cli import main
from depthmix.data.load import load_data
from depthmix.train.interrupt import StopOnRequest


def weights(folder):
    return load_file(next(Path(folder).glob("*.safetensors")))


def one_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if "depthmix: error:" in line]
    assert len(lines) == 1
    return lines[0]


def test_trains_saves_and_says_how_to_go_on(train, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert train("--max_steps", "4", "--learning_rate", "1e-2") == 0
    saved, router, late = capsys.readouterr().out.splitlines()[-3:]
    assert saved.startswith(f"saved in {out}; loss ")
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in entries if "router_entropy" in entry]
    weights_of = [f"{logged[at][f'router_weight/layer_{n}']:.2f}" for at in (-1, 0) for n in (2, 3)]
    assert router.startswith(
        "router: layers 2, 3 have {}, {} of the weight ({}, {} at first); ".format(*weights_of)
    )
    assert router.endswith(f"entropy {logged[-1]['router_entropy']:.2f} nats of at most 0.69")
    assert late.endswith(f"see what they do: depthmix report {out} HELD_OUT_ROWS")
    assert not list(out.glob(".*"))
    for name in ("adapter_config.json", "tokenizer.json", "depthmix.yaml"):
        assert (out / name).exists()
    stored = yaml.safe_load((out / "depthmix.yaml").read_text())
    assert (stored["k"], stored["max_steps"]) == (2, 4)
    assert stored["dataset_format"] == "prompt_completion"
    assert "Mixture-of-Depths Ensemble" in (out / "README.md").read_text()

    base = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.tensor([[5, 6, 7]])
    before = base(ids).logits
    model = depthmix.load(base, out).eval()
    assert not torch.equal(model(ids).logits, before)
    assert any("lora_B" in name and tensor.any() for name, tensor in weights(out).items())
    assert weights(out)["base_model.model.depthmix.router.weight"].any()


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        (["--method", "dora"], "lora_magnitude_vector"),
        (["--method", "ia3"], "ia3_l"),
        (["--method", "vera", "--vera_r", "8"], "vera_lambda_b"),
        (["--method", "prompt_tuning", "--num_virtual_tokens", "3"], "prompt_embeddings"),
        (["--method", "none"], "depthmix.norm.scale"),
        (["--method", "full"], "q_proj.weight"),
        (["--late_layers_only", "--lora_target_modules", "q_proj", "v_proj"], "layers.3"),
        (["--tuned_layers", "half", "--lora_r", "1"], "layers.3"),
        (["--tuned_layers", "2", "--no_mode"], "layers.2"),
        (["--no_mode"], "lora_B"),
        (["--no_mode", "--method", "full"], "q_proj.weight"),
    ],
)
def test_every_method(train, tmp_path, flags, trained):
    assert train("--max_steps", "1", *flags) == 0
    names = list(weights(tmp_path / "out"))
    assert any(trained in name for name in names)
    assert any("depthmix" in name for name in names) == ("--no_mode" not in flags)
    if {"--late_layers_only", "--tuned_layers"} & {*flags}:
        assert not any("layers.0" in name or "layers.1" in name for name in names)


def test_evaluates_packs_and_accumulates(train, rows, tmp_path, capsys):
    flags = ["--max_steps", "2", "--eval_dataset", rows, "--eval_steps", "1"]
    assert train(*flags, "--gradient_accumulation_steps", "2", "--gradient_checkpointing") == 0
    saved, _, late = capsys.readouterr().out.splitlines()[-3:]
    assert "; eval loss " in saved
    assert late.endswith(f"depthmix report {tmp_path / 'out'}")


def test_learning_rates_of_router_and_norms(train, tmp_path):
    assert train("--max_steps", "1", "--router_learning_rate", "0") == 0
    saved = weights(tmp_path / "out")
    assert not saved["base_model.model.depthmix.router.weight"].any()
    assert saved["base_model.model.depthmix.norm.scale"].any()


def test_stopped_and_continued_equals_uninterrupted(train, tmp_path, monkeypatch, capsys):
    flags = ["--num_train_epochs", "2", "--save_strategy", "no", "--lora_dropout", "0.1"]
    assert train(*flags, output="whole") == 0
    original = StopOnRequest.on_step_end

    def interrupt_at_2(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnRequest, "on_step_end", interrupt_at_2)
    handler = signal.getsignal(signal.SIGINT)
    assert train(*flags, output="stopped") == 130
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    said = capsys.readouterr().err
    stopped = tmp_path / "stopped"
    advice = f"go on with: depthmix train {stopped / 'depthmix.yaml'} --resume"
    assert f"stopped after step 2 of 6; {advice}" in said
    assert (stopped / "checkpoint-2" / "optimizer.pt").exists()
    assert not (stopped / "adapter_config.json").exists()

    # A checkpoint that was cut off while being written is not taken.
    (stopped / "checkpoint-3").mkdir()
    assert main(["train", str(stopped / "depthmix.yaml"), "--resume"]) == 0
    whole, continued = weights(tmp_path / "whole"), weights(stopped)
    assert whole.keys() == continued.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(continued[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(tiny, rows, tmp_path):
    command = [
        *(sys.executable, "-W", "ignore", "-m", "depthmix", "train"),
        *("--model_name_or_path", tiny, "--dataset", rows, "--output_dir", str(tmp_path / "out")),
        *("--max_steps", "100000", "--logging_steps", "1", "--disable_tqdm", "--k", "2"),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if "loss" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors.splitlines()[-1]
    assert len(list((tmp_path / "out").glob("checkpoint-*/trainer_state.json"))) == 1


def test_a_folder_that_is_taken(train, tiny, tmp_path, capsys):
    assert train("--max_steps", "1") == 0
    capsys.readouterr()
    assert train("--max_steps", "1") == 2
    assert "holds a finished run: go on with it (--resume), replace it" in one_line(capsys)
    assert train("--resume", "--lora_r", "3") == 2
    assert "--resume: lora_r was 16 and is 3 now" in one_line(capsys)
    assert train("--max_steps", "1", "--overwrite", "--method", "none", "--save_steps", "1") == 0
    assert not any("lora" in name for name in weights(tmp_path / "out"))
    (tmp_path / "out" / "adapter_config.json").unlink()
    assert train("--max_steps", "1") == 2
    assert "holds an unfinished run" in one_line(capsys)
    assert train("--resume", output="new") == 2
    assert "no checkpoint in" in one_line(capsys)
    assert train("--resume_from_checkpoint", str(tmp_path / "new")) == 2
    assert "there is no whole checkpoint" in one_line(capsys)


def test_other_models_are_not_overwritten(train, tiny, tmp_path, capsys):
    assert train("--output_dir", tiny, "--overwrite") == 2
    assert "is the folder of the base model" in one_line(capsys)
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "out")
    assert train("--overwrite") == 2
    assert "holds a model that depthmix did not train" in one_line(capsys)
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("flags", "status", "complaint"),
    [
        (["--model_name_or_path", "./none"], 1, "model ./none: there is no such folder"),
        (
            ["--model_name_or_path", "no/such"],
            1,
            "model no/such: there is no such folder, and no such model",
        ),
        (["--dataset", "none.jsonl"], 1, "none.jsonl: No such file or directory"),
        (["--k", "9"], 1, "k = 9, but LlamaForCausalLM has 4 layers"),
        (["--lora_target_modules", "nothing"], 2, "method lora: No modules were targeted"),
        (["--optim", "lomo"], 2, "optim: You need to install `lomo_optim`"),
        (["--assistant_only_loss", "--supervise", "all"], 2, "set supervise assistant"),
        (["--chat_template_path", "no.jinja"], 2, "no.jinja: No such file or directory"),
        (["--eos_token", "<none>"], 2, "eos_token '<none>' is no token of the tokenizer"),
        (["--report_to", "comet_ml"], 2, "CometCallback requires comet-ml"),
        (["--loss_type", "dft"], 2, "loss_type='dft'"),
        (["--max_length", "2"], 1, "no row is left"),
        (["--chat_template_path", "no/such"], 2, "chat_template_path: expected a .jinja file"),
        (["--bf16"], 2, "SFTConfig: Your setup doesn't support bf16"),
        (["--attn_implementation", "flash_attention_2"], 1, "FlashAttention2"),
    ],
)
def test_what_goes_wrong_is_one_line(train, capsys, flags, status, complaint):
    assert train(*flags) == status
    assert complaint in one_line(capsys)


def test_rows_that_are_too_long_are_told(train, capsys):
    assert train("--max_steps", "1", "--max_length", "8") == 0
    said = capsys.readouterr().out
    assert "note: 10 of 12 rows are cut to max_length (8)\n" in said
    assert "note: 2 of 12 rows are left out: nothing to learn within max_length (8)\n" in said


def test_options_without_effect_are_told(train, capsys):
    flags = ["--max_steps", "1", "--method", "vera", "--lora_r", "4", "--lora_dropout", "0"]
    assert train(*flags, "--vera_r", "8") == 0
    assert "note: method vera does not read lora_r\n" in capsys.readouterr().out


@pytest.fixture
def chats(tmp_path):
    chat = [{"role": "user", "content": "3 + 4?"}, {"role": "assistant", "content": "7"}]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join([json.dumps({"messages": chat * 2})] * 4))
    return str(path)


def of(dataset, model, output, *flags):
    required = ("--model_name_or_path", model, "--dataset", dataset, "--output_dir", str(output))
    return main(["train", *required, "--disable_tqdm", "--k", "2", "--max_steps", "1", *flags])


def test_messages_need_a_chat_template(tiny, chats, tmp_path, capsys):
    assert of(chats, tiny, tmp_path / "out") == 0
    stored = yaml.safe_load((tmp_path / "out" / "depthmix.yaml").read_text())
    assert (stored["dataset_format"], stored["supervise"]) == ("messages", "assistant")
    bare = tmp_path / "bare"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(bare)
    assert of(chats, str(bare), tmp_path / "other") == 2
    assert "no chat template" in one_line(capsys)


@pytest.mark.parametrize("flags", [[], ["--validation_split", "0.5"], ["--supervise", "all"]])
def test_a_row_that_the_template_refuses_is_named_by_line(tiny, chats, tmp_path, capsys, flags):
    """Wherever it ends up: behind another file, a blank line and a shuffle."""
    template = tmp_path / "strict.jinja"
    refusal = "{% if m.content == 'No' %}{{ raise_exception('never No') }}{% endif %}"
    template.write_text(CHAT_TEMPLATE.replace("<|{{ m.role", refusal + "<|{{ m.role"))
    line = json.dumps({"messages": [{"role": "user", "content": "?"}, {"role": "assistant"}]})
    good, bad = (line[:-3] + f', "content": "{word}"}}]}}' for word in ("Yes", "No"))
    second = tmp_path / "second.jsonl"
    second.write_text(f"{good}\n\n{bad}\n{good}\n")
    flags = ["--dataset", str(second), "--chat_template_path", str(template), *flags]
    assert of(chats, tiny, tmp_path / "out", *flags) == 1
    expected = f"{second}: line 3: the chat template does not take the messages: never No"
    assert expected in one_line(capsys)


@pytest.fixture
def trained_on(monkeypatch):
    """The rows of the trainer that a command makes."""
    seen = {}
    original = SFTTrainer.train

    def train(self, *args, **kwargs):
        seen["rows"], seen["eval"] = self.train_dataset, self.eval_dataset
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "train", train)
    return seen


@pytest.mark.parametrize(
    ("supervise", "expected"),
    [("assistant", 2), ("last", 1), ("all", 4)],
)
def test_what_the_trainer_supervises(tiny, chats, tmp_path, trained_on, supervise, expected):
    assert of(chats, tiny, tmp_path / "out", "--supervise", supervise) == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    labels = trained_on["rows"][0]["labels"]
    assert labels.count(tokenizer.eos_token_id) == expected
    text = tokenizer.decode([label for label in labels if label >= 0])
    assert text.replace("<|user|>3 + 4?<|end|><|assistant|>", "") == "7<|end|>" * (
        2 if supervise != "last" else 1
    )


def test_a_validation_share_and_packing(tiny, rows, tmp_path, trained_on, capsys):
    flags = ["--validation_split", "0.25", "--packing", "--max_length", "64"]
    assert of(rows, tiny, tmp_path / "out", *flags) == 0
    assert len(trained_on["eval"]) == 1  # three rows, packed
    assert sum(map(sum, trained_on["eval"]["seq_lengths"])) < 64
    assert "eval loss" in capsys.readouterr().out


def test_an_end_token_of_the_runs_own(tiny, rows, tmp_path, trained_on):
    assert of(rows, tiny, tmp_path / "out", "--eos_token", "<|user|>") == 0
    assert trained_on["rows"][0]["labels"][-1] == 1


def test_the_preview_shows_what_is_learned_and_leaves_nothing(
    tiny, chats, rows, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    command = ["train", "--model_name_or_path", tiny, "--preview"]
    assert main([*command, "2", "--dataset", chats]) == 0
    shown = capsys.readouterr().out
    asked = "<|user|>3 + 4?<|end|><|assistant|>{+7<|end|>+}"
    assert shown.count(f"{asked}{asked}\n") == 2
    assert "supervised: between {+ and +}" in shown
    assert "rows: 4 of format messages, supervise: assistant\n" in shown
    assert "; the first row ends with <|end|>\n" in shown
    assert main([*command, "--dataset", rows, "--max_length", "8", "--supervise", "all"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("{+What is") == 3
    assert "max_length 8: 12 rows cut, 0 left out with nothing to learn\n" in shown
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is 3 + 4?", "completion": " 7."},
        {"instruction": "What is 3 + 4?", "input": "", "output": "\nA: 7.", "answer": "7"},
        {"question": "What is 3 + 4?", "answer": "3+4=<<3+4=7>>7\n#### 7"},
        {"text": "The answer is 7."},
    ],
)
def test_the_end_of_sequence_is_supervised(row, tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny),
        args=SFTConfig(str(tmp_path), bf16=False, activation_checkpointing=False),
        train_dataset=load_data([str(path)])[0],
        processing_class=tokenizer,
    )
    example = trainer.train_dataset[0]
    assert example["labels"][-1] == example["input_ids"][-1] == tokenizer.eos_token_id
    supervised = [label for label in example["labels"] if label != -100]
    text = tokenizer.decode(supervised)
    assert text.endswith("7.<|end|>") or text.endswith("7<|end|>")
    assert ("What is" in text) is False
