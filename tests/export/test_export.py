"""The exported folder in a process without depthmix gives the same logits and replies."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

import depthmix
from depthmix.cli import main
from depthmix.errors import ConfigError, DepthmixError
from depthmix.export.code import is_own_code
from depthmix.export.folder import export_model
from depthmix.model.temperature import set_temperature
from models import perturb, tiny_model
from tiny_types import tiny_config
from without_depthmix import IDS, forwards_of, near, without_depthmix

CASES = {
    "default": ("llama", {}),
    "paper": ("llama", {"adaptation": "norm", "router_prior": None, "k": 3}),
    "affine": ("llama", {"adaptation": "affine", "router_top_k": 2, "router_input": "all"}),
    "none": ("llama", {"adaptation": "none", "k": 2, "router_input": "first"}),
    "soft cap": ("gemma2", {}),
    "scale": ("granite", {}),
    "tied": ("qwen2", {}),
    "biased head": ("phi", {}),
    "other names": ("gpt_neox", {}),
    "trunk within": ("opt", {}),
}


class NoTokenizer:
    def save_pretrained(self, folder):
        pass


def tuned(model_type, **config):
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = depthmix.attach(tiny_model(model_type), depthmix.MoDEConfig(**config), lora).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    perturb(model.get_base_model().depthmix.modules_to_save["default"])
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """For every case: the merged model, what the folder gives in another process, the folder."""
    parent = tmp_path_factory.mktemp("exports")
    cases = {}
    with torch.no_grad(), without_depthmix() as ask:
        for name, (model_type, config) in CASES.items():
            model = tuned(model_type, **config)
            unmerged = model(IDS).logits
            export_model(model, NoTokenizer(), parent / name)
            merged = model.get_base_model()
            torch.testing.assert_close(merged(IDS).logits, unmerged, rtol=1e-3, atol=1e-3)
            cases[name] = merged, ask(parent / name, whole=True), parent / name
    return cases


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_model_without_depthmix(exported, case):
    model, found, folder = exported[case]
    with torch.no_grad():
        wanted, _ = forwards_of(model)
    close = {"rtol": 1e-4, "atol": 1e-5}
    logits = wanted["logits"]
    torch.testing.assert_close(found["logits"], logits, **close)
    torch.testing.assert_close(found["last"], logits[:, -1:], **close)
    torch.testing.assert_close(found["by position"], logits[:, [2, 5]], **close)
    torch.testing.assert_close(found["compiled"], logits, **close)
    torch.testing.assert_close(found["again"], logits, **close)
    assert near(found["bfloat16"], wanted["bfloat16"], 0.02)
    for tokens in ("generation", "left padding"):
        assert torch.equal(found[tokens], wanted[tokens])
    assert torch.equal(found["without cache"], found["generation"])
    assert torch.equal(found["trunk"], found["of the model"])
    assert torch.equal(found["trunk again"], found["trunk"])
    assert found["dtypes"] == {"torch.float32"}
    assert is_own_code(folder)


@torch.no_grad()
def test_a_stream_in_fp32_is_cast_for_the_head(tmp_path):
    """Zaya keeps the stream between its layers in fp32, and casts it for its final norm."""
    base = AutoModelForCausalLM.from_config(tiny_config("zaya"))
    model = depthmix.attach(base, depthmix.MoDEConfig(k=2)).eval()
    perturb(model.depthmix)
    export_model(model, NoTokenizer(), tmp_path)
    options = {"trust_remote_code": True, "dtype": torch.bfloat16}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    for half in (loaded, copy.deepcopy(model).bfloat16()):
        assert half(IDS).logits.dtype == torch.bfloat16
        assert near(half(IDS).logits, model(IDS).logits, 0.05)


@pytest.mark.parametrize("case", ["default", "paper", "soft cap"])
def test_a_token_costs_at_most_eight_operations(exported, case):
    operations = exported[case][1]["operations"]
    assert 6 <= len(operations) <= 8, operations


def test_the_scale_of_granite_is_folded_in(exported):
    """Engines that bring a head of their own would leave it out."""
    model, found, folder = exported["scale"]
    assert model.config.logits_scaling == 4.0
    assert json.loads((folder / "config.json").read_text())["logits_scaling"] == 1.0
    logits = model.get_output_embeddings()(found["trunk"])
    torch.testing.assert_close(logits, found["logits"], rtol=1e-4, atol=1e-5)


def test_requests_of_unlike_lengths_in_one_batch(exported):
    """By the continuous batching of transformers."""
    _, _, folder = exported["default"]
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    prompts = [IDS[0, :length].tolist() for length in (2, 7, 4)]
    how = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=96, pad_token_id=0)
    batch = model.generate_batch(inputs=prompts, generation_config=how)
    for prompt, reply in zip(prompts, batch.values(), strict=True):
        alone = model.generate(torch.tensor([prompt]), generation_config=how)
        assert reply.generated_tokens == alone[0, len(prompt) :].tolist()


def test_command(tiny, rows, tmp_path, capsys):
    flags = ["--model_name_or_path", tiny, "--dataset", rows, "--max_steps", "1", "--k", "2"]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "tuned")]) == 0
    assert main(["export", str(tmp_path / "tuned"), str(tmp_path / "out")]) == 0
    assert "trust_remote_code=True" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (
        config["auto_map"]["AutoModelForCausalLM"] == "modeling_depthmix.DepthMixLlamaForCausalLM"
    )
    assert "depthmix.spec" not in (tmp_path / "out/model.safetensors").read_bytes()[:20000].decode(
        "latin1"
    )
    record = (tmp_path / "out/depthmix.yaml").read_text()
    assert "dataset_format: prompt_completion" in record  # so that it is asked as it was tuned
    AutoTokenizer.from_pretrained(tmp_path / "out")
    ask = pipeline("text-generation", model=str(tmp_path / "out"), trust_remote_code=True)
    assert ask("w5 w6", max_new_tokens=2)[0]["generated_text"].startswith("w5 w6")
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


@torch.no_grad()
def test_a_temperature_is_folded_into_the_mixture(tmp_path):
    """The same tokens are the likeliest, and engines need not know of it."""
    model = tuned("llama")
    plain = model(IDS).logits
    set_temperature(model, 1.7)
    export_model(model, NoTokenizer(), tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    logits = loaded(IDS).logits
    torch.testing.assert_close(logits, plain / 1.7, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits.argmax(-1), plain.argmax(-1))
