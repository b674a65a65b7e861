"""Tuning from cached depth: the parameters of training without it, and what comes of full disks."""

import copy
import errno
import shutil

import pytest
import torch
from cached_runs import CONFIG, assert_same, batches, late, lora, packed_batches, train
from peft import get_peft_model
from safetensors import SafetensorError

import depthmix
from depthmix.cache.depth import cached_depth
from depthmix.carry.adapters import mode_only_config
from depthmix.carry.depth import restricted
from depthmix.errors import ConfigError
from depthmix.model.discovery import discover
from depthmix.model.runtime import runtime_of
from models import TYPES, tiny_model, token_ids


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("model_type", TYPES)
def test_parameters_are_those_without_the_cache(model_type, tmp_path):
    base = tiny_model(model_type, **({"resid_pdrop": 0.0} if model_type == "gpt2" else {}))
    plain, model = late(base), late(base)
    losses = train(plain)
    with cached_depth(model, tokens=100, folder=tmp_path) as cache:
        assert train(model) == pytest.approx(losses, rel=1e-5)
    assert (cache.misses, cache.hits) == (2, 4)
    assert len(cache.store) == 4
    assert_same(model, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_stored_bit_for_bit(dtype, tmp_path):
    """Rows of one length, so that no padding changes the order of a sum."""
    base = tiny_model("llama")
    batch = {"input_ids": token_ids(), "labels": token_ids()}
    model = late(base, dtype).train()
    with cached_depth(model, tokens=100, folder=tmp_path) as cache:
        losses = [model(**batch).loss for _ in range(2)]
    assert (cache.misses, cache.hits) == (1, 1)
    assert torch.equal(*losses)
    assert cache.store.dtype == dtype


def test_later_run_uses_the_cache_of_an_earlier_one(tmp_path):
    base = tiny_model("llama")
    with cached_depth(late(base), tokens=100, folder=tmp_path) as first:
        train(first._prefix.host)
    model = late(base)
    with cached_depth(model, tokens=100, folder=tmp_path) as second:
        train(model)
    assert second.misses == 1, "the first batch is checked anew"
    plain = late(base)
    train(plain)
    assert_same(model, plain, rtol=1e-4, atol=1e-5)


def test_two_runs_at_once_on_one_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("depthmix.cache.store.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("depthmix.cache.store.LOOK_SECONDS", 0.0)
    base = tiny_model("llama")
    plain, *models = (late(base) for _ in range(3))
    train(plain)
    with (
        cached_depth(models[0], tokens=100, folder=tmp_path) as first,
        cached_depth(models[1], tokens=100, folder=tmp_path) as second,
    ):
        train(models[0])
        train(models[1])
        assert (first.misses, second.misses) == (2, 1)
        train(models[0])
    assert first.hits == 10
    assert len(list(first.folder.glob("*.index"))) == 1, "the second run had nothing to add"
    assert_same(models[1], plain, rtol=1e-4, atol=1e-5)


def test_model_is_as_before_after_the_block(tmp_path):
    model = late(tiny_model("llama"))
    host = model.get_base_model()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), cached_depth(model, 2, 100, tmp_path):
        raise ZeroDivisionError
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not any("forward" in vars(layer) for layer in host.model.layers)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [batches, packed_batches])
def test_half_of_the_layers_tuned(k, dtype, form, tmp_path):
    """Rows are padded, or packed in other company every time."""
    base = tiny_model("llama")
    models = [late(base, dtype, k=k, tuned_layers="half") for _ in range(2)]
    losses = train(models[0], form)
    with cached_depth(models[1], tokens=100, folder=tmp_path) as cache:
        found = train(models[1], form)
    assert (cache.misses, cache.hits) == (2, 4)
    assert len(cache.store) == 4
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    )
    assert found == pytest.approx(losses, rel=1e-5 if dtype == torch.float32 else 2e-2)
    assert_same(*models, **tolerance)


def test_evaluation_in_between_is_cached_as_well(tmp_path):
    base = tiny_model("llama")
    plain, model = late(base), late(base)
    losses = train(plain, evaluate=True)
    with cached_depth(model, tokens=100, folder=tmp_path) as cache:
        assert train(model, evaluate=True) == pytest.approx(losses, rel=1e-5)
    assert (cache.misses, cache.hits) == (4, 8)
    assert_same(model, plain, rtol=1e-4, atol=1e-5)


def test_evaluation_without_labels_runs_the_layers(tmp_path):
    model = late(tiny_model("llama")).eval()
    expected = model.generate(token_ids(), max_new_tokens=3, min_new_tokens=3)
    with cached_depth(model, tokens=100, folder=tmp_path) as cache:
        for _ in range(2):
            found = model.generate(token_ids(), max_new_tokens=3, min_new_tokens=3)
            assert torch.equal(found, expected)
    assert (cache.misses, cache.hits) == (0, 0)


def test_the_trunk_alone_runs_its_layers(tmp_path):
    """After a forward of the model that was replayed, which is another call."""
    model = late(tiny_model("llama"))
    trunk = model.get_base_model().model
    with cached_depth(model, tokens=100, folder=tmp_path):
        train(model)
        other = token_ids().flip(1)
        found = trunk(other).last_hidden_state
    assert torch.equal(found, trunk(other).last_hidden_state)


def test_states_can_be_stored_in_bfloat16(tmp_path):
    base = tiny_model("llama")
    plain, model = late(base), late(base)
    losses = train(plain)
    with cached_depth(model, tokens=100, folder=tmp_path, dtype=torch.bfloat16) as cache:
        found = train(model)
    assert cache.hits == 4
    assert cache.store.dtype == torch.bfloat16
    assert found != losses
    assert found == pytest.approx(losses, rel=2e-2)


def test_figures_and_random_numbers_are_those_without_the_check(tmp_path):
    """Dropout in the tuned layers, a fourth of the tokens distilled: both draw in every step."""
    base, runs = tiny_model("llama"), []
    for folder in (None, tmp_path):
        torch.manual_seed(1)
        config = depthmix.MoDEConfig(k=2, distill_fraction=0.25)
        model = depthmix.attach(copy.deepcopy(base), config, lora(lora_dropout=0.5), tuned_layers=2)
        torch.manual_seed(2)
        if folder is None:
            losses = train(model)
        else:
            with cached_depth(model, tokens=100, folder=folder):
                losses = train(model)
        statistics = runtime_of(model).statistics
        runs.append((losses, statistics.forwards, statistics.take().tolist()))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-5)
    assert runs[1][1] == runs[0][1]
    assert runs[1][2] == pytest.approx(runs[0][2], rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_late_lora(reentrant, tmp_path):
    base = tiny_model("llama")
    torch.manual_seed(1)
    plain = get_peft_model(copy.deepcopy(base), restricted(lora(), discover(base, CONFIG), 2))
    model = copy.deepcopy(plain)
    train(plain)
    host = model.get_base_model()
    host.activation_checkpointing_enable({"use_reentrant": reentrant})
    host.enable_input_require_grads()
    with cached_depth(model, tokens=100, folder=tmp_path) as cache:
        train(model)
    assert cache.hits == 4
    assert_same(model, plain, rtol=1e-4, atol=1e-5)


def test_mode_alone_is_cached(tmp_path):
    base = tiny_model("llama")
    models = [depthmix.attach(copy.deepcopy(base), CONFIG, mode_only_config()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    train(models[0])
    with cached_depth(models[1], tokens=100, folder=tmp_path) as cache:
        train(models[1])
    assert cache.hits == 4
    assert_same(*models, rtol=1e-4, atol=1e-5)


def test_full_disk_is_told_beforehand(tmp_path):
    model = late(tiny_model("llama"))
    with (
        pytest.raises(ConfigError, match=r"[MG]iB free; choose another folder with cache_dir"),
        cached_depth(model, tokens=10**15, folder=tmp_path),
    ):
        pass


def refuse(descriptor, size):
    """The disk as it is when it is full."""
    raise OSError(errno.ENOSPC, "No space left on device")


def test_disk_that_fills_costs_the_cache_and_not_the_training(tmp_path, monkeypatch, caplog):
    """The others' rows are still read; nothing of this run stays."""
    base = tiny_model("llama")
    folder = tmp_path / "caches"
    model, plain = late(base), late(base)
    train(plain)
    monkeypatch.setattr("depthmix.cache.segment.allocate", refuse)
    with cached_depth(model, tokens=100, folder=folder) as cache:
        train(model)
    assert (cache.hits, cache.misses) == (0, 6)
    assert not any(folder.iterdir())
    assert [record.message for record in caplog.records] == [
        f"cache: {cache.folder}: No space left on device; no more rows are kept"
    ]
    assert_same(model, plain, rtol=0, atol=0)


def test_an_index_that_cannot_be_written_costs_the_cache_and_not_the_training(
    tmp_path, monkeypatch, caplog
):
    def full(*_args, **_options):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("depthmix.cache.segment.save_file", full)
    with cached_depth(late(tiny_model("llama")), tokens=100, folder=tmp_path) as cache:
        train(cache._prefix.host)
    assert cache.hits == 4
    assert not any(tmp_path.iterdir())
    assert "cache: not kept: a checkpoint could not be written" in caplog.text


def test_a_whole_cache_needs_no_room(tmp_path, monkeypatch):
    base, tokens = tiny_model("llama"), 9 + 6 + 7 + 9
    with cached_depth(late(base), tokens=tokens, folder=tmp_path) as cache:
        train(cache._prefix.host)
    monkeypatch.setattr("depthmix.cache.segment.allocate", refuse)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with cached_depth(late(base), tokens=tokens, folder=tmp_path) as cache:
        train(cache._prefix.host)
    assert cache.misses == 1
    with (
        pytest.raises(ConfigError, match="iB free"),
        cached_depth(late(base), tokens=tokens + 1, folder=tmp_path),
    ):
        pass
