"""What a probe measures, against the definition; the rule; `auto` in training."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from transformers import BartConfig, BartForCausalLM, RobertaConfig, RobertaForCausalLM

import depthmix
import reference
from depthmix.cli import main
from depthmix.errors import ConfigError
from depthmix.model.runtime import runtime_of
from depthmix.probe import observe as observing
from depthmix.probe.choice import choose, shares
from depthmix.probe.lens import RIDGE, mapped_to_last, predictions
from depthmix.probe.observe import Observed, observe
from depthmix.train.arguments import parse
from models import ANATOMIES, LAYERS, randomise, tiny_model, token_ids

IGNORED = -100


def token_rows(count=5):
    """Rows of unequal length, the first half of each not supervised."""
    made = []
    for i in range(count):
        ids = token_ids(1, 6 + i)[0].roll(i).tolist()
        made.append({"input_ids": ids, "labels": [IGNORED] * (3 + i % 2) + ids[3 + i % 2 :]})
    return made


def on_all_layers(base, lora=True):
    config = depthmix.MoDEConfig(k=LAYERS, adaptation="none")
    base.requires_grad_(False)
    peft = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    model = depthmix.attach(base, config, peft)
    return model.eval() if lora else model.requires_grad_(False).eval()


def naive(base, model_type):
    """Normed states of all layers, logits of the last and labels, row by row."""
    anatomy = ANATOMIES[model_type]
    for row in token_rows():
        ids = torch.tensor([row["input_ids"]])
        normed = reference.normed_states(base, anatomy, LAYERS, input_ids=ids)[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        yield normed[labels != IGNORED], labels[labels != IGNORED]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "opt"])
def test_states_and_gradients_are_those_of_the_definition(model_type, monkeypatch):
    monkeypatch.setattr(observing, "TOKENS_AT_ONCE", 20)  # several batches
    monkeypatch.setattr(observing, "CHUNK_BYTES", 4 * 97 * 2)  # two tokens a chunk
    base = tiny_model(model_type)
    expected = [states for states, _ in naive(base, model_type)]
    labels = torch.cat([labels for _, labels in naive(base, model_type)])
    model = on_all_layers(base)
    seen = observe(model, token_rows())
    order = seen.rows.argsort(stable=True)
    torch.testing.assert_close(seen.states[order], torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(seen.labels[order], labels)
    assert seen.tokens == len(labels) == len(seen.labels)
    model.zero_grad()
    depthmix.detach(model)
    for row in token_rows():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        F.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum").backward()
    for layer, norm in enumerate(seen.gradients):
        path = f"{ANATOMIES[model_type].layers}.{layer}"
        parameters = model.get_base_model().get_submodule(path).parameters()
        squares = sum(p.grad.square().sum() for p in parameters if p.grad is not None)
        assert norm == pytest.approx(squares.sqrt().item() / len(labels), rel=1e-3)
        assert norm > 0


@pytest.mark.parametrize("shifted", [True, False])
def test_layers_behind_more_than_a_norm_and_labels_that_stay(shifted):
    """RoBERTa has dense layers in front of its head; BART's causal form predicts its own labels."""
    common = {"vocab_size": 97, "max_position_embeddings": 64, "is_decoder": True}
    if shifted:
        sizes = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
        base = RobertaForCausalLM(RobertaConfig(intermediate_size=64, **sizes, **common))
    else:
        sizes = {f"{part}_layers": LAYERS for part in ("encoder", "decoder")}
        sizes |= {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
        base = BartForCausalLM(BartConfig(d_model=32, decoder_ffn_dim=64, **sizes, **common))
    model = on_all_layers(randomise(base).eval())
    seen = observe(model, token_rows())
    alone, _ = predictions(runtime_of(model), seen)
    depthmix.detach(model)
    losses = []
    for i, row in enumerate(token_rows()):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"])
        logits, labels = (logits[:-1], labels[1:]) if shifted else (logits, labels)
        losses += F.cross_entropy(logits, labels, reduction="none")[labels >= 0] if i % 2 else []
    assert alone.loss[-1] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
    assert min(seen.gradients) > 0


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite"])
def test_predictions_are_those_of_the_definition(model_type, monkeypatch):
    monkeypatch.setattr(observing, "CHUNK_BYTES", 4 * 97 * 3)
    base = tiny_model(model_type)
    anatomy, parts = ANATOMIES[model_type], list(naive(base, model_type))
    fit = torch.cat([states for i, (states, _) in enumerate(parts) if i % 2 == 0]).double()
    score = torch.cat([states for i, (states, _) in enumerate(parts) if i % 2 == 1]).double()
    labels = torch.cat([labels for i, (_, labels) in enumerate(parts) if i % 2 == 1])
    head = base.get_output_embeddings().weight.detach().double()
    model = on_all_layers(base, lora=False)
    seen = observe(model, token_rows())
    assert seen.gradients == []
    alone, fitted = predictions(runtime_of(model), seen)
    for layer in range(LAYERS):
        mapped = score[:, layer] + ridge(fit[:, layer], fit[:, -1], score[:, layer])
        for found, states in ((alone, score[:, layer]), (fitted, mapped)):
            logits = anatomy.transform(states @ head.T)
            last = anatomy.transform(score[:, -1] @ head.T)
            loss = F.cross_entropy(logits, labels).item()
            assert found.loss[layer] == pytest.approx(loss, rel=1e-3)
            right = (logits.argmax(-1) == labels).double().mean().item()
            assert found.accuracy[layer] == pytest.approx(right)
            same = (logits.argmax(-1) == last.argmax(-1)).double().mean().item()
            assert found.agreement[layer] == pytest.approx(same)
            p, q = last.log_softmax(-1), logits.log_softmax(-1)
            divergence = (p.exp() * (p - q)).sum(-1).mean().item()
            assert found.divergence[layer] == pytest.approx(divergence, rel=1e-3, abs=1e-5)
    assert alone.agreement[-1] == fitted.agreement[-1] == 1.0


def ridge(states, last, others):
    """The primal form, d x d, of what the code does in n x n."""
    mean, gap = states.mean(0), last - states
    x = states - mean
    penalty = RIDGE * x.square().sum(1).mean()
    weights = torch.linalg.inv(x.T @ x + penalty * torch.eye(x.shape[1])) @ x.T
    return gap.mean(0) + (others - mean) @ weights @ (gap - gap.mean(0))


def test_a_map_finds_a_linear_relation():
    states, map_ = torch.randn(200, 8), torch.randn(8, 8)
    last = states @ map_ + 3.0
    found = mapped_to_last(states[:100], last[:100], states[100:])
    assert (found - last[100:]).norm() < 0.2 * last[100:].norm()


def test_states_of_long_data_are_picked_evenly(monkeypatch):
    monkeypatch.setattr(observing, "KEPT_TOKENS", 8)
    seen = observe(on_all_layers(tiny_model("llama"), lora=False), token_rows())
    assert len(seen.labels) <= 8 + len(set(seen.rows.tolist()))
    assert seen.tokens == sum(
        label != IGNORED for row in token_rows() for label in row["labels"][1:]
    )


def test_the_rule():
    assert choose([9.0, 1.04, 1.2, 1.03, 1.0], [1.0] * 5).k == 2  # without a gap
    assert choose([1.0] * 6, []).k == 4
    assert choose([3.0, 2.0, 1.0], []).k == 1
    assert choose([3.0, 2.0, 1.0], []).tuned_layers is None
    assert choose([1.0] * 6, [1.0] * 6).tuned_layers == 2
    assert choose([1.0] * 4, [9.0, 0.0, 0.0, 1.0]).tuned_layers == 4
    assert shares([1.0, 1.0, 2.0]) == [1.0, 0.75, 0.5]
    assert choose([2.0, 1.0], [0.0, 0.0]).tuned_layers == 2


def test_command_prints_a_table_of_80_columns_and_draws(tiny, rows, tmp_path, capsys):
    picture = tmp_path / "probe.png"
    flags = ["--lora_r", "2", "--plot", str(picture), "--use_cpu"]
    assert main(["probe", tiny, rows, *flags]) == 0
    printed = capsys.readouterr().out.partition("picture: ")[0]
    assert max(map(len, printed.splitlines())) <= 80
    assert "…" not in printed
    assert "tuned_layers = " in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_command_prints_json_with_costs(tiny, rows, capsys):
    assert main(["probe", tiny, rows, "--json", "--rows", "6"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], len(found["layers"])) == (6, 4)
    steps = [layer["step_flops"] for layer in found["layers"]]
    assert steps == sorted(steps, reverse=True)
    assert found["layers"][0]["gradient_share_from_here"] == pytest.approx(1.0)
    assert found["recommended"]["k"] >= 1


def test_without_a_tuning_method_there_is_no_depth_to_choose(tiny, rows, capsys):
    assert main(["probe", tiny, rows, "--json", "--method", "none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"]["tuned_layers"] is None
    assert "gradient" not in found["layers"][0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "3"], "--k: not an option of probe"),
        (["--rows", "1"], "--rows must be an integer >= 2"),
        (["--lora_rank", "3"], "lora_rank: no such option; did you mean lora_r"),
    ],
)
def test_wrong_options_are_one_line(tiny, rows, flags, message, capsys):
    assert main(["probe", tiny, rows, *flags]) == 2
    assert message in capsys.readouterr().err


def test_train_takes_what_is_recommended_and_records_it(train, tmp_path, capsys):
    flags = ("--tuned_layers", "auto", "--max_steps", "2")
    assert train(*flags) == 0
    assert "tuned_layers = " in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "depthmix_run.json").read_text())
    depth = record["probe"]["tuned_layers"]
    assert record["options"]["tuned_layers"] == str(depth)
    assert record["options"]["k"] == 2
    assert len(record["probe"]["reasons"]) == 2


def test_a_resumed_run_keeps_what_was_chosen(train, tmp_path, monkeypatch, capsys):
    flags = ("--tuned_layers", "auto", "--num_train_epochs", "2", "--save_steps", "2")
    assert train(*flags) == 0
    before = json.loads((tmp_path / "out" / "depthmix_run.json").read_text())["options"]
    monkeypatch.setattr("depthmix.probe.settle.probe", SimpleNamespace)  # cannot be called so
    capsys.readouterr()
    assert train(*flags, "--resume") == 0, capsys.readouterr().err
    after = json.loads((tmp_path / "out" / "depthmix_run.json").read_text())["options"]
    assert after["tuned_layers"] == before["tuned_layers"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k", "auto", "--no_mode"], "k: auto chooses the layers of MoDE"),
        (["--tuned_layers", "auto", "--method", "full"], "tuned_layers needs lora"),
        (["--tuned_layers", "auto", "--late_layers_only"], "give one of them"),
    ],
)
def test_auto_where_there_is_nothing_to_choose(flags, message):
    fixed = ["--model_name_or_path", "m", "--dataset", "d", "--output_dir", "o"]
    with pytest.raises(ConfigError, match=message):
        parse([*fixed, *flags])


def test_observed_rows_alternate():
    seen = Observed(torch.zeros(3, 2, 4), torch.zeros(3).long(), torch.tensor([0, 1, 2]), 3, [])
    assert seen.fitting.tolist() == [True, False, True]
