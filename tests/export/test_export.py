"""The exported folder in a process without depthmix gives the same logits and replies."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoTokenizer, LlamaForCausalLM

import depthmix
from depthmix.cli import main
from depthmix.errors import ConfigError, DepthmixError
from depthmix.export.folder import export_model
from models import perturb, tiny_model

IDS = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(5))
CONFIGS = {
    "default": {},
    "paper": {"adaptation": "norm", "router_prior": None, "k": 3},
    "affine": {"adaptation": "affine", "router_top_k": 2, "router_input": "all"},
    "none": {"adaptation": "none", "k": 2, "router_input": "first"},
}
SCRIPT = """
import sys, json, torch
class Blocker:
    def find_spec(self, name, *_):
        if name.split(".")[0] == "depthmix":
            raise ImportError("depthmix is not installed here")
sys.meta_path.insert(0, Blocker())
from transformers import AutoModelForCausalLM
folder, out, dtype = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=getattr(torch, dtype)
).eval()
assert {p.dtype for p in model.depthmix.parameters()} == {torch.float32}
ids = torch.load(out)
with torch.no_grad():
    logits = model(ids).logits
    reply = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, use_cache=False)
assert torch.equal(reply, plain)
model.save_pretrained(folder + "-again")
torch.save({"logits": logits, "reply": reply}, out)
"""


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


def in_another_process(folder, tmp_path, dtype="float32"):
    out = tmp_path / "out.pt"
    torch.save(IDS, out)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), str(out), dtype],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out)


def tuned(model_type, **config):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = depthmix.attach(tiny_model(model_type), depthmix.MoDEConfig(**config), lora).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    perturb(model.get_base_model().depthmix.modules_to_save["default"])
    return model


@pytest.mark.parametrize(
    ("model_type", "config"),
    [*(("llama", name) for name in CONFIGS), ("gemma2", "default"), ("opt", "default")],
)
def test_logits_are_the_same_without_depthmix(model_type, config, tmp_path):
    model = tuned(model_type, **CONFIGS[config])
    with torch.no_grad():
        unmerged = model(IDS).logits
    export_model(model, NoTokenizer(), tmp_path / "exported")
    with torch.no_grad():
        merged = model.get_base_model()(IDS).logits
    found = in_another_process(tmp_path / "exported", tmp_path)
    assert torch.equal(found["logits"], merged)
    torch.testing.assert_close(merged, unmerged, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_bf16(tmp_path):
    """Against depthmix on the exported weights, read in the same dtype."""
    model = tuned("llama")
    mixture = model.get_base_model().depthmix.modules_to_save["default"]
    export_model(model, NoTokenizer(), tmp_path / "exported")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.bfloat16).eval()
    depthmix.attach(base, mixture.config).depthmix.load_state_dict(mixture.state_dict())
    with torch.no_grad():
        expected = base(IDS).logits
    found = in_another_process(tmp_path / "exported", tmp_path, "bfloat16")
    assert torch.equal(found["logits"], expected)


def test_command(tiny, rows, tmp_path, capsys):
    flags = ["--model_name_or_path", tiny, "--dataset", rows, "--max_steps", "1", "--k", "2"]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "tuned")]) == 0
    assert main(["export", str(tmp_path / "tuned"), str(tmp_path / "out")]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_depthmix.DepthMixForCausalLM"
    assert "depthmix.spec" not in (tmp_path / "out/model.safetensors").read_bytes()[:20000].decode(
        "latin1"
    )
    record = (tmp_path / "out/depthmix.yaml").read_text()
    assert "dataset_format: prompt_completion" in record  # so that it is asked as it was tuned
    AutoTokenizer.from_pretrained(tmp_path / "out")
    assert main(["export", str(tmp_path / "tuned"), str(tmp_path / "out")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", tiny, str(tmp_path / "x")]) == 1
    assert "holds no MoDE" in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused(tmp_path):
    with pytest.raises(DepthmixError, match="no MoDE is attached"):
        export_model(tiny_model("llama"), NoTokenizer(), tmp_path / "a")
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = depthmix.attach(tiny_model("llama"), depthmix.MoDEConfig(k=2), prompt)
    with pytest.raises(DepthmixError, match="prompt cannot be merged"):
        export_model(model, NoTokenizer(), tmp_path / "b")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        export_model(tuned("llama"), NoTokenizer(), tmp_path / "full")
