"""`depthmix plan`: counts are those of the real thing; no weights are loaded; the output fits."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import depthmix
from depthmix.carry.adapters import mode_only_config
from depthmix.cli import main
from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError
from depthmix.plan.cards import fit, memory_of, read_size
from depthmix.plan.memory import mode_parameters
from depthmix.plan.methods import METHODS
from depthmix.plan.profile import Setting
from depthmix.plan.report import count
from depthmix.train.run_options import RunOptions
from models import ANATOMIES, tiny_model

SETTING = Setting(rows=2, length=8, dtype=torch.float32)


def lora(rank=4):
    return LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")


def bills_of(model_type, *names, setting=SETTING, checkpointing=False, **changes):
    anatomy = ANATOMIES[model_type]
    counted = count(
        anatomy.config(**(anatomy.options | changes)),
        setting,
        {name: METHODS[name] for name in names or METHODS},
        k=2,
        rank=4,
        adapter=lora,
        checkpointing=lambda _: checkpointing,
    )
    return counted.bills


def real(model_type, method):
    """The model as `attach` or PEFT would build it."""
    base, config, alone = tiny_model(model_type), MoDEConfig(k=2), MoDEConfig(k=1)
    return {
        "full": lambda: base,
        "lora": lambda: get_peft_model(base, lora()),
        "lora+mode": lambda: depthmix.attach(base, config, lora()),
        "half": lambda: depthmix.attach(base, alone, lora(), tuned_layers="half"),
        "light": lambda: depthmix.attach(base, alone, lora(1), tuned_layers="half"),
        "late-lora+mode": lambda: depthmix.attach(base, config, lora(), late_layers_only=True),
        "mode": lambda: depthmix.attach(base, config, mode_only_config()),
    }[method]()


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # PEFT, of GPT-2
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "gpt_neox", "opt"])
def test_trained_parameters_are_those_of_the_real_model(model_type):
    for name, bill in bills_of(model_type).items():
        assert bill.trained == trained(real(model_type, name)), name
        assert bill.adapter_bytes == 4 * bill.trained


def test_late_layers_keep_fewer_activations_and_mode_alone_none():
    bills = bills_of("llama", "lora", "half", "mode")
    kept = {name: bill.memory.activations for name, bill in bills.items()}
    assert kept["mode"] == 0 < kept["half"] < 0.6 * kept["lora"]


def test_mode_parameters_are_those_of_the_mixture():
    model = depthmix.attach(tiny_model("llama"), MoDEConfig(k=3))
    assert mode_parameters(MoDEConfig(k=3), 32) == trained(model.depthmix)
    assert mode_parameters(MoDEConfig(k=1), 32) == 0


def test_full_fine_tuning_takes_sixteen_bytes_a_parameter():
    setting = Setting(rows=2, length=8)  # bf16 arithmetic on fp32 weights
    memory = bills_of("llama", "full", setting=setting)["full"].memory
    parameters = trained(tiny_model("llama"))
    assert memory.weights + memory.gradients + memory.optimizer == 16 * parameters


def test_a_base_of_four_bits():
    setting = Setting(rows=2, length=8)
    bill = bills_of("llama", "lora", setting=setting)["lora"]
    model = tiny_model("llama")
    linear = {n: p.numel() for n, p in model.named_parameters() if "proj" in n}
    others = sum(p.numel() for p in model.parameters()) - sum(linear.values())
    packed = sum(linear.values()) * (0.5 + 4 / 64) + 2 * others + 2 * bill.trained
    assert bill.memory_4bit.weights == int(packed) + 2 * max(linear.values())
    assert bill.memory_4bit.optimizer == 2 * 2 * bill.trained


def test_sharding_divides_what_is_sharded():
    one, four = (
        bills_of("llama", "full", setting=Setting(2, 8, gpus=n, sharded=True))["full"].memory
        for n in (1, 4)
    )
    assert four.optimizer == one.optimizer // 4
    assert four.activations == one.activations
    model = tiny_model("llama")
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    whole = sum(p.numel() for p in model.parameters()) - 4 * layer + 2 * layer
    assert four.weights == one.weights // 4 + 4 * whole


def test_copies_on_several_devices_hold_gradients_twice():
    alone, copied = (
        bills_of("llama", "lora", setting=Setting(2, 8, gpus=n))["lora"].memory for n in (1, 2)
    )
    assert copied.gradients == 2 * alone.gradients
    assert copied.weights == alone.weights


def test_checkpointing_keeps_what_enters_layers_and_runs_forward_twice():
    kept, checked = (
        bills_of("llama", "lora", checkpointing=checkpointing)["lora"]
        for checkpointing in (False, True)
    )
    assert checked.memory.activations < 0.5 * kept.memory.activations
    again = checked.flops.backward - kept.flops.backward
    assert again == pytest.approx(kept.flops.forward, rel=0.1)
    assert RunOptions(method="lora", tuned_layers="half").tunes_many_layers
    assert not RunOptions(method="lora", late_layers_only=True).tunes_many_layers


def test_scores_are_memory_only_where_attention_holds_them():
    activations = {
        attention: bills_of(
            "llama", "lora", setting=Setting(1, 128, dtype=torch.float32, attention=attention)
        )["lora"].memory.activations
        for attention in ("sdpa", "eager")
    }
    scores = 4 * 4 * 128 * 128 * 4  # bytes x layers x tokens x tokens x heads
    assert 0.7 * scores < activations["eager"] - activations["sdpa"] < scores


def test_cached_depth_leaves_the_prefix_out():
    bills = bills_of("llama")
    assert bills["lora"].flops.cached is None
    half, mode = bills["half"].flops, bills["mode"].flops
    assert half.step - half.cached == pytest.approx(mode.forward / 2)
    assert mode.step - mode.cached == pytest.approx(mode.forward / 2)  # k = 2 of four layers run


def test_state_space_layers_are_counted_at_short_lengths():
    from transformers import MambaConfig

    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=97)
    counted = [
        count(
            config,
            Setting(rows=1, length=length, dtype=torch.float32),
            {"half": METHODS["half"]},
            k=1,
            rank=4,
            adapter=lora,
            checkpointing=lambda _: False,
        )
        for length in (8, 16, 24)
    ]
    near, middle, far = (c.bills["half"] for c in counted)
    # The first is counted as it is, and the others lie on one line with it.
    for path in ("memory.activations", "flops.forward", "flops.backward"):
        part, name = path.split(".")
        values = [getattr(getattr(bill, part), name) for bill in (near, middle, far)]
        assert values[2] - values[1] == pytest.approx(values[1] - values[0], rel=0.02), path
    assert near.kv_bytes == far.kv_bytes
    assert "out_proj" in counted[0].note


def test_whether_it_fits():
    gib = 2**30
    assert memory_of("H100") == 81559 * 2**20
    with pytest.raises(ConfigError, match="did you mean h100"):
        memory_of("h10")
    assert [fit(size * gib, 24 * gib) for size in (10, 22, 24)] == ["yes", "tight", "no"]
    assert read_size("24GiB") == read_size("24") == 24 * gib
    assert read_size("80 GB") == 80 * 10**9
    for wrong in ("", "GiB", "-1", "24 apples", "0"):
        with pytest.raises(ValueError, match="must be a size"):
            read_size(wrong)


def test_table_fits_80_columns(tiny, capsys, monkeypatch):
    def no_weights(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", no_weights)
    monkeypatch.setenv("COLUMNS", "80")
    flags = ["--length", "16", "--gpu", "t4", "--tuned-layers", "3"]
    assert main(["plan", tiny, *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)
    rows = [line.split()[0] for line in lines if line.strip()]
    assert all(rows.count(name) == 2 for name in METHODS)
    assert any(line.startswith("cached depth:") for line in lines)
    assert sum(line.split()[:2] == ["tuned", "3"] for line in lines) == 2


def test_json_gives_everything(tiny, capsys):
    assert main(["plan", tiny, "--length", "16", "--memory", "1GiB", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert set(plan["methods"]) == set(METHODS)
    lora = plan["methods"]["lora"]
    assert lora["checkpointing"] is True
    assert lora["memory"]["total"] == sum(
        lora["memory"][part]
        for part in ("weights", "gradients", "optimizer", "activations", "loss")
    )
    assert lora["memory"]["fits"] == "no"  # CUDA takes as much for itself
    assert lora["flops"]["cached"] is None
    assert plan["methods"]["half"]["flops"]["cached"] < plan["methods"]["half"]["flops"]["step"]
    assert plan["methods"]["full"]["memory_4bit"] is None


def test_dtype_of_the_weights(tiny, capsys):
    def weights(*flags):
        assert main(["plan", tiny, "--length", "16", "--json", *flags]) == 0
        return json.loads(capsys.readouterr().out)["methods"]["lora"]["memory"]["weights"]

    assert weights() == weights("--dtype", "bfloat16") < weights("--dtype", "float32")
    assert weights("--dtype", "auto") == weights("--dtype", "float32")  # as the folder says


def test_modelling_code_of_a_folder_is_run_where_it_is_trusted(tmp_path, capsys):
    """As `bench`, which reads the configuration by the same function."""
    (tmp_path / "configuration_own.py").write_text(
        "from transformers import LlamaConfig\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\n"
        "from .configuration_own import OwnConfig\n\n\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 4}
    classes = {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModelForCausalLM": "modeling_own.OwnModel",
    }
    config = {"model_type": "own", "num_attention_heads": 4, "auto_map": classes, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    plan = ["plan", str(tmp_path), "--length", "16"]
    assert main(plan) == 1
    assert "--trust-remote-code" in capsys.readouterr().err
    assert main([*plan, "--trust-remote-code"]) == 0
    assert "lora+mode" in capsys.readouterr().out


def test_errors(tiny, capsys):
    for flags, message in (
        (["--k", "9"], "9: a number from 1 to 4"),
        (["--tuned-layers", "most"], "most"),
        (["--gpu", "voodoo"], "no card"),
        (["--memory", "much"], "must be a size"),
        (["--gpu", "t4", "--memory", "1GiB"], "not allowed with"),
    ):
        assert main(["plan", tiny, *flags]) == 2
        assert message in capsys.readouterr().err
    assert main(["plan", "/nowhere"]) == 1
    assert "no such folder" in capsys.readouterr().err
