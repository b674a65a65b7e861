"""The real 135M model: MoDE on it is exact at the start, learns, and generates."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import depthmix
from depthmix.cli import main
from doc_blocks import blocks, commands

pytestmark = pytest.mark.real
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def write_rows() -> None:
    rows = [{"prompt": f"What is {i} + 3?", "completion": f" {i + 3}"} for i in range(2)]
    Path("train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_one_hot_router_is_the_base_model_and_training_lowers_the_loss(
    real_model_folder: Path,
) -> None:
    base = AutoModelForCausalLM.from_pretrained(real_model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(real_model_folder)
    inputs = tokenizer(
        "The capital of France is Paris. The capital of Italy is", return_tensors="pt"
    )
    with torch.no_grad():
        expected = base(**inputs).logits
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = depthmix.attach(base, depthmix.MoDEConfig(k=3), lora, late_layers_only=True)
    router = base.depthmix.modules_to_save["default"].router
    with torch.no_grad():
        router.bias[-1] = 1e4
        assert torch.equal(model(**inputs).logits, expected)
        router.bias.zero_()
    model.train()
    optimizer = torch.optim.AdamW(depthmix.param_groups(model, lr=1e-3))
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.eval()
    with depthmix.routing(model) as record:
        cached = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    uncached = model.generate(**inputs, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)
    assert record.layers == (27, 28, 29)
    assert record.mean().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning", "ignore:'pin_memory' argument:UserWarning"
)
def test_readme_examples_run(
    real_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows()
    fast = 'SFTConfig("out", bf16=False, max_steps=1)'
    local = {HUB_NAME: str(real_model_folder), 'SFTConfig("out")': fast}
    for example in blocks("README.md", kinds=("python",)):
        example.run({}, local)
    assert Path("out/adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_readme_commands_run(
    real_model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("/exit\n"))
    write_rows()
    lines = [words[1:] for _, words in commands("README.md") if words[0] == "depthmix"]
    names = ["info", "train", "train", "generate", "chat", "eval", "plan"]
    assert [line[0] for line in lines] == names
    for line in lines:
        arguments = [str(real_model_folder) if word == HUB_NAME else word for word in line]
        short = ["--max_steps", "1"] if arguments[0] == "train" else []
        assert main([*arguments, *short]) == 0, capsys.readouterr().err
