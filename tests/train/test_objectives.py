"""`--objective dpo | grpo`: from rows to a saved adapter, by TRL's own trainers."""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOTrainer

import depthmix
from depthmix.cli import main
from depthmix.train.interrupt import StopOnRequest
from doc_blocks import blocks, commands

PAIRS = [
    {"prompt": f"What is {n} + 4?", "chosen": f" {n + 4}.", "rejected": f" {n + 5}, is it?"}
    for n in range(8)
]
ASKED = [{"prompt": f"What is {n} + 4?", "answer": n + 4} for n in range(8)]
GRPO = ["--num_generations", "2", "--max_completion_length", "4", "--max_steps", "2"]
GRPO += ["--gradient_accumulation_steps", "2", "--reward", "number:answer"]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def logged(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


def error(capsys):
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "depthmix: error:" in x]
    return line


@pytest.fixture
def run(tiny, tmp_path):
    """Run `depthmix train` on rows; returns the status."""

    def run(objective, rows, *flags, output="out", model=tiny):
        data = write(tmp_path / f"{objective}.jsonl", rows) if isinstance(rows, list) else rows
        own = [] if "--k" in flags or "--no_mode" in flags or model != tiny else ["--k", "2"]
        return main(
            [
                *("train", "--objective", objective, "--model_name_or_path", model),
                *("--dataset", data, "--output_dir", str(tmp_path / output), *own),
                *("--logging_steps", "1", "--disable_tqdm", *flags),
            ]
        )

    return run


@pytest.fixture(scope="session")
def supervised(tiny, rows, tmp_path_factory):
    """Folder of a supervised run."""
    folder = str(tmp_path_factory.mktemp("supervised") / "out")
    flags = ["--max_steps", "2", "--learning_rate", "1e-2", "--disable_tqdm", "--k", "2"]
    command = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--output_dir", folder]
    assert main([*command, *flags]) == 0
    return folder


def test_preferences_are_learned_and_told(run, tiny, tmp_path, capsys):
    assert run("dpo", PAIRS, "--num_train_epochs", "8", "--learning_rate", "1e-2") == 0
    said = capsys.readouterr().out
    assert "pairs right 1" in said
    assert "margin" in said
    assert "router 0." in said
    out = tmp_path / "out"
    history = [entry for entry in logged(out) if "rewards/margins" in entry]
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)  # itself is the reference
    assert history[-1]["rewards/margins"] > 0.1
    assert not (out / "ref").exists()
    stored = yaml.safe_load((out / "depthmix.yaml").read_text())
    assert (stored["objective"], stored["dataset_format"]) == ("dpo", "preference")
    model = depthmix.load(AutoModelForCausalLM.from_pretrained(tiny), out)
    assert list(model.peft_config) == ["default"]
    assert main(["generate", str(out), "--prompt", "What is 3 + 4?", "--max-new-tokens", "3"]) == 0


def test_rewards_are_learned_and_told(run, tmp_path, capsys):
    assert run("grpo", ASKED, *GRPO, "--beta", "0.1", "--distill_signed") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]
    assert len(lines) == 2
    for figure in ("reward ", " ± ", "answer length ", "KL ", "router 0."):
        assert all(figure in line for line in lines), figure
    out = tmp_path / "out"
    facts = json.loads((out / "depthmix_run.json").read_text())["options"]
    assert (facts["objective"], facts["reward"]) == ("grpo", ["number:answer"])
    assert (facts["per_device_train_batch_size"], facts["num_generations"]) == (2, 2)
    assert not (out / "ref").exists()
    assert main(["generate", str(out), "--prompt", "What is 3 + 4?", "--max-new-tokens", "3"]) == 0


@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_without_mode_is_trls_trainer(run, tmp_path, objective):
    rows, flags = (PAIRS, ["--max_steps", "1"]) if objective == "dpo" else (ASKED, GRPO)
    assert run(objective, rows, "--no_mode", *flags) == 0
    assert not any("depthmix" in name for name in weights(tmp_path / "out"))


def test_preferences_train_as_in_ones_own_script(run, tiny, tmp_path):
    """The same rows and options by TRL's DPOTrainer on an attached model: the same tensors."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, set_seed

    flags = ["--max_steps", "3", "--seed", "5", "--learning_rate", "1e-2", "--weight_decay", "0.1"]
    assert run("dpo", PAIRS, *flags) == 0
    set_seed(5)
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    base = AutoModelForCausalLM.from_pretrained(tiny)
    model = depthmix.attach(base, depthmix.MoDEConfig(k=2), lora)
    options = {"report_to": "none", "bf16": False, "gradient_checkpointing": False}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            str(tmp_path / "own"), max_steps=3, seed=5, dataloader_pin_memory=False, **options
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(tiny),
    )
    groups = depthmix.param_groups(
        model, lr=1e-2, router_lr=2.5e-3, norm_lr=7.5e-4, weight_decay=0.1
    )
    trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"params": groups})
    trainer.train()
    trainer.save_model()
    own, ours = weights(tmp_path / "own"), weights(tmp_path / "out")
    for name, tensor in ours.items():
        if not name.endswith("spec"):
            torch.testing.assert_close(tensor, own[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("objective", "rows", "flags"),
    [
        ("dpo", PAIRS, ["--max_steps", "4"]),
        ("grpo", ASKED, [*GRPO[:-2], "--reward", "regex:[a-m]"]),
    ],
)
def test_stopped_and_resumed_is_uninterrupted(run, tmp_path, monkeypatch, objective, rows, flags):
    flags = [*flags, "--max_steps", "4", "--beta", "0.1", "--save_strategy", "no"]
    assert run(objective, rows, *flags, output="whole") == 0
    original = StopOnRequest.on_step_end

    def interrupt_at_2(self, args, state, control, **kwargs):
        if state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        original(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnRequest, "on_step_end", interrupt_at_2)
        assert run(objective, rows, *flags) == 128 + signal.SIGTERM
    assert main(["train", str(tmp_path / "out" / "depthmix.yaml"), "--resume"]) == 0
    whole, continued = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert whole.keys() == continued.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(continued[name], tensor, rtol=0, atol=0, msg=name)


def test_resume_refuses_another_objective_and_another_reward(run, tmp_path, monkeypatch, capsys):
    stop = StopOnRequest.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        self.received = signal.SIGTERM
        stop(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StopOnRequest, "on_step_end", interrupt)
        assert run("grpo", ASKED, *GRPO) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert run("grpo", ASKED, *GRPO[:-1], "exact:answer", "--resume") == 2
    assert "reward was ['number:answer'] and is ['exact:answer'] now" in error(capsys)
    assert run("dpo", PAIRS, "--resume") == 2
    assert "objective was grpo and is dpo now" in error(capsys)


def test_evaluation_tells_rewards(run, tmp_path, capsys):
    held = write(tmp_path / "held.jsonl", ASKED[:4])
    flags = ["--eval_dataset", held, "--eval_steps", "1", "--early_stopping_patience", "1"]
    assert run("grpo", ASKED, *GRPO, *flags, "--max_steps", "1") == 0
    assert "eval reward " in capsys.readouterr().out
    (figures,) = [entry for entry in logged(tmp_path / "out") if "eval_reward" in entry]
    assert figures["eval_reward_se"] >= 0


def test_rewards_go_on_from_an_adapter(run, supervised, tmp_path, capsys):
    """`--model_name_or_path` is the folder of a supervised run: its adapter is trained on."""
    flags = [*GRPO, "--divergence", "js", "--learning_rate", "0", "--router_learning_rate", "0"]
    assert run("grpo", ASKED, *flags, "--norm_learning_rate", "0", model=supervised) == 0
    before, after = weights(supervised), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert name.endswith("spec") or torch.equal(after[name], tensor), name
    spec = after["base_model.model.depthmix.spec"]
    assert json.loads(bytes(spec.tolist()))["config"]["divergence"] == "js"
    stored = yaml.safe_load((tmp_path / "out" / "depthmix.yaml").read_text())
    assert (stored["k"], stored["method"]) == (2, "lora")
    facts = json.loads((tmp_path / "out" / "depthmix_run.json").read_text())
    assert (
        facts["base"]["name"]
        == json.loads((Path(supervised) / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
    )
    capsys.readouterr()
    assert run("grpo", ASKED, *GRPO, "--k", "3", model=supervised, output="other") == 2
    assert "--k: the adapter in" in error(capsys)


@pytest.mark.parametrize(
    "flags",
    [
        *(["--method", m] for m in ("dora", "ia3", "vera", "prompt_tuning", "none", "full")),
        ["--precompute_ref_log_probs"],
    ],
)
def test_every_method_is_compared_with_itself(run, tmp_path, flags):
    assert run("dpo", PAIRS, *flags, "--max_steps", "1") == 0
    first = next(entry for entry in logged(tmp_path / "out") if "rewards/margins" in entry)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("objective", "flags", "said"),
    [
        ("dpo", ["--supervise", "last"], "supervise: only objective sft takes it"),
        ("dpo", ["--packing"], "--packing: objective dpo has no such option, which is one of"),
        ("dpo", ["--num_generations", "4"], "which is one of objective grpo"),
        ("sft", ["--num_generations", "4"], "objective sft has no such option"),
        ("dpo", ["--reward", "number:answer"], "objective dpo knows no rewards; grpo does"),
        ("dpo", ["--dataset_format", "alpaca"], "objective dpo reads rows of format chat_pref"),
        ("dpo", ["--k", "auto"], "k: auto reads supervised rows"),
        ("grpo", ["--cache", "on"], "cache: objective grpo runs all layers"),
        ("grpo", [], "reward is missing"),
        ("grpo", ["--reward", "numbr:answer"], "did you mean number?"),
        ("grpo", ["--reward", "number:"], "expected number:COLUMN"),
        ("grpo", ["--reward", "regex:("], "not a regular expression"),
        ("grpo", ["--reward", "no_such_module:f"], "no_such_module cannot be imported from"),
        ("grpo", ["--reward", "json:no_such"], "json has no function no_such"),
        ("grpo", ["--reward", "reasoning_gym:chain_sums"], "did you mean chain_sum?"),
        ("grpo", ["--reward", "number:answer", "--entropy_coef", "0.1"], "entropy_coef: the loss"),
        ("grpo", ["--temperature", "0"], "--temperature: must be > 0"),
        ("grpo", ["--max_completion_length", "0"], "--max_completion_length: must be >= 1"),
        ("grpo", ["--top_p", "1.5"], "--top_p: must be in (0, 1]"),
        ("grpo", ["--reward", "number:answer", "--loss_type", "grop"], "loss_type grop: expected"),
        ("dpo", ["--loss_type", "sigmod"], "loss_type sigmod: expected"),
        ("grpo", ["--reward", "number:solution"], "line 1: field solution is missing"),
        ("grpo", ["--reward", "number:answer", "--num_generations", "1"], "at least 2 generations"),
        (
            "grpo",
            ["--reward", "number:answer", "--method", "full", "--beta", "0.1"],
            "beta: with method full",
        ),
    ],
)
def test_what_cannot_be_is_one_line(run, tmp_path, capsys, objective, flags, said):
    status = run(objective, ASKED if objective == "grpo" else PAIRS, *flags)
    assert status == (1 if "line 1" in said else 2)  # data; options
    assert said in error(capsys)
    assert not (tmp_path / "out").exists()


def test_preview_shows_pairs_and_what_would_be_rewarded(run, capsys):
    assert run("dpo", PAIRS, "--preview", "1") == 0
    said = capsys.readouterr().out
    assert "chosen:  4.<|end|>" in said
    assert "rejected:  5, is it?<|end|>" in said
    assert "rows: 8 of format preference" in said
    assert run("grpo", ASKED, *GRPO, "--preview", "1") == 0
    said = capsys.readouterr().out
    assert "What is 0 + 4?" in said
    assert "rewarded by number:answer: a last number that is 4" in said
    assert "answers: 2 a prompt, of up to 4 tokens, to 2 prompts at a time" in said


def test_trainers_are_trls_own():
    from depthmix.train.objectives.options import trainer_class

    assert (trainer_class("dpo"), trainer_class("grpo")) == (DPOTrainer, GRPOTrainer)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_transcript_of_the_docs_runs(tiny, tmp_path, monkeypatch, capsys):
    """Its commands, a step each, on a tiny model."""
    monkeypatch.chdir(tmp_path)
    page = "docs/objectives.md"
    for block in blocks(page, kinds=("python",)):
        block.run({})
    steps = [words for _, words in commands(page) if "--output_dir" in words]
    names = [w[w.index("--objective") + 1] if "--objective" in w else "sft" for w in steps]
    assert names == ["sft", "grpo", "dpo"]
    for _, *words in steps:
        local = [tiny if w == "HuggingFaceTB/SmolLM2-135M-Instruct" else w for w in words]
        assert main([*local, "--max_steps", "1"]) == 0, capsys.readouterr().err
