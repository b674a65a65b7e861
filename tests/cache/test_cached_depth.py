"""Tuning from cached depth: exact, safe on disk, refused where the prefix is not frozen."""

import copy
import errno
import shutil

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import SafetensorError
from trl import SFTConfig

import depthmix
from depthmix.cache.depth import cached_depth, row_digests
from depthmix.cache.store import StateStore
from depthmix.carry.adapters import mode_only_config
from depthmix.carry.depth import restricted
from depthmix.cli import main
from depthmix.errors import ConfigError
from depthmix.model.discovery import discover
from models import PLAIN, TYPES, tiny_model, token_ids

CONFIG = depthmix.MoDEConfig(k=2, **PLAIN)


def lora(**changes):
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **changes)


def late(base, dtype=torch.float32, k=2):
    torch.manual_seed(1)
    model = copy.deepcopy(base).to(dtype)
    config = depthmix.MoDEConfig(k=k, **PLAIN)
    return depthmix.attach(model, config, lora(), late_layers_only=True)


def batches():
    """Four rows of different lengths, padded right, in an order that changes with the epoch."""
    ids = token_ids(batch=4, length=9)
    mask = torch.ones_like(ids)
    for row, length in enumerate((9, 6, 7, 9)):
        mask[row, length:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]):
        for pair in (order[:2], order[2:]):
            width = int(mask[pair].sum(1).max())
            yield {
                "input_ids": ids[pair, :width],
                "attention_mask": mask[pair, :width],
                "labels": labels[pair, :width],
            }


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for batch in batches():
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(model, other, **tolerance):
    for (name, a), b in zip(parameters(model).items(), parameters(other).values(), strict=True):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize("model_type", TYPES)
def test_parameters_are_those_without_the_cache(model_type, tmp_path):
    base = tiny_model(model_type, **({"resid_pdrop": 0.0} if model_type == "gpt2" else {}))
    plain, model = late(base), late(base)
    losses = train(plain)
    with cached_depth(model, k=2, tokens=100, folder=tmp_path) as cache:
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
    with cached_depth(model, k=2, tokens=100, folder=tmp_path) as cache:
        losses = [model(**batch).loss for _ in range(2)]
    assert (cache.misses, cache.hits) == (1, 1)
    assert torch.equal(*losses)
    assert cache.store.dtype == dtype


def test_later_run_uses_the_cache_of_an_earlier_one(tmp_path):
    base = tiny_model("llama")
    with cached_depth(late(base), k=2, tokens=100, folder=tmp_path) as first:
        train(first._prefix.host)
    model = late(base)
    with cached_depth(model, k=2, tokens=100, folder=tmp_path) as second:
        train(model)
    assert second.misses == 0
    plain = late(base)
    train(plain)
    assert_same(model, plain, rtol=1e-4, atol=1e-5)


def test_other_model_or_depth_has_a_cache_of_its_own(tmp_path):
    base = tiny_model("llama")
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    folders = []
    for model, k in ((base, 2), (other, 2), (base, 3)):
        with cached_depth(late(model, k=k), k=k, tokens=100, folder=tmp_path) as cache:
            folders.append(cache.folder)
    assert len(set(folders)) == 3


def test_model_is_as_before_after_the_block(tmp_path):
    model = late(tiny_model("llama"))
    host = model.get_base_model()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), cached_depth(model, 2, 100, tmp_path):
        raise ZeroDivisionError
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert not any("forward" in vars(layer) for layer in host.model.layers)


def test_evaluation_runs_the_layers(tmp_path):
    model = late(tiny_model("llama"))
    with cached_depth(model, 2, 100, tmp_path) as cache:
        model.eval()
        expected = model(token_ids()).logits
        train(model)
    assert cache.hits == 4
    assert expected.isfinite().all()


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
    with cached_depth(model, 2, 100, tmp_path) as cache:
        train(model)
    assert cache.hits == 4
    assert_same(model, plain, rtol=1e-4, atol=1e-5)


def test_mode_alone_is_cached(tmp_path):
    base = tiny_model("llama")
    models = [depthmix.attach(copy.deepcopy(base), CONFIG, mode_only_config()) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    train(models[0])
    with cached_depth(models[1], 2, 100, tmp_path) as cache:
        train(models[1])
    assert cache.hits == 4
    assert_same(*models, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda base: depthmix.attach(base, CONFIG, lora()), r"layers\.0.*lora_A.* is trained"),
        (
            lambda base: depthmix.attach(
                base, CONFIG, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
            ),
            "the prompt is trained",
        ),
        (lambda base: depthmix.attach(base, CONFIG), "is trained, which lies below"),
        (lambda base: late(base, k=4), "all layers are late layers"),
    ],
)
def test_prefix_that_is_not_frozen_is_refused(build, message, tmp_path):
    model = build(tiny_model("llama"))
    k = 4 if message.startswith("all") else 2
    with pytest.raises(ConfigError, match=message), cached_depth(model, k, 100, tmp_path):
        pass


def test_dropout_below_the_late_layers_is_refused(tmp_path):
    model = late(tiny_model("llama", attention_dropout=0.1))
    with pytest.raises(ConfigError, match="attention dropout"), cached_depth(model, 2, 9, tmp_path):
        pass


def test_full_disk_is_told_beforehand(tmp_path):
    model = late(tiny_model("llama"))
    with (
        pytest.raises(ConfigError, match=r"[MG]iB free; choose another folder with cache_dir"),
        cached_depth(model, 2, 10**15, tmp_path),
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
    monkeypatch.setattr("depthmix.cache.store.allocate", refuse)
    with cached_depth(model, k=2, tokens=100, folder=folder) as cache:
        train(model)
    assert (cache.hits, cache.misses) == (0, 6)
    assert not any(folder.iterdir())
    assert [record.message for record in caplog.records] == [
        f"cache: no room in {cache.folder} (No space left on device); training goes on without it"
    ]
    assert_same(model, plain, rtol=0, atol=0)


def test_an_index_that_cannot_be_written_costs_the_cache_and_not_the_training(
    tmp_path, monkeypatch, caplog
):
    def full(*_args, **_options):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("depthmix.cache.store.save_file", full)
    with cached_depth(late(tiny_model("llama")), k=2, tokens=100, folder=tmp_path) as cache:
        train(cache._prefix.host)
    assert cache.hits == 4
    assert not any(tmp_path.iterdir())
    assert "cache: not kept: a checkpoint could not be written" in caplog.text


def test_a_whole_cache_needs_no_room(tmp_path, monkeypatch):
    base, tokens = tiny_model("llama"), 9 + 6 + 7 + 9
    with cached_depth(late(base), k=2, tokens=tokens, folder=tmp_path) as cache:
        train(cache._prefix.host)
    monkeypatch.setattr("depthmix.cache.store.allocate", refuse)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with cached_depth(late(base), k=2, tokens=tokens, folder=tmp_path) as cache:
        train(cache._prefix.host)
    assert cache.misses == 0
    with (
        pytest.raises(ConfigError, match="iB free"),
        cached_depth(late(base), k=2, tokens=tokens + 1, folder=tmp_path),
    ):
        pass


def test_digest_depends_on_tokens_and_places_not_on_padding_to_the_right():
    ids, mask = torch.tensor([[5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 0]])
    digest = row_digests(ids, mask, None)
    assert row_digests(ids[:, :3], mask[:, :3], None) == digest
    left = row_digests(torch.tensor([[0, 5, 6, 7]]), torch.tensor([[0, 1, 1, 1]]), None)
    assert left != digest
    assert row_digests(torch.tensor([[5, 6, 8, 0]]), mask, None) != digest
    positions = torch.tensor([[0, 1, 2, 3]])
    assert row_digests(ids, mask, positions) == digest
    assert row_digests(ids, mask, positions + 1) != digest
    assert row_digests(ids, mask, None, "torch.bfloat16") != digest


# --- the store


def store(folder, capacity=10):
    return StateStore(folder, 3, torch.float32, capacity)


def test_rows_are_there_after_closing(tmp_path):
    first = store(tmp_path)
    rows = {bytes([i] * 16): torch.randn(i + 1, 3) for i in range(3)}
    for digest, states in rows.items():
        first.add(digest, states)
    first.close()
    second = store(tmp_path)
    second.add(bytes([9] * 16), torch.ones(1, 3))
    second.close()
    third = store(tmp_path)
    assert len(third) == 4
    for digest, states in rows.items():
        assert torch.equal(third.get(digest), states)


def test_what_a_crash_leaves_is_not_read(tmp_path):
    first = store(tmp_path)
    first.add(b"a" * 16, torch.ones(2, 3))
    del first  # never closed
    assert list(tmp_path.glob("*.states"))
    assert len(store(tmp_path)) == 0


def test_the_room_is_taken_before_the_states_are_written(tmp_path):
    """A hole of a full disk that is mapped and written to would be a SIGBUS."""
    first = store(tmp_path, capacity=10**5)
    first.add(b"a" * 16, torch.ones(2, 3))
    (states,) = tmp_path.glob("*.states")
    assert states.stat().st_blocks * 512 >= 10**5 * 3 * 4
    first.close()
    assert states.stat().st_size == 2 * 3 * 4


def test_a_torn_index_is_not_read(tmp_path):
    first = store(tmp_path)
    first.add(b"a" * 16, torch.ones(2, 3))
    first.close()
    (index,) = tmp_path.glob("*.index")
    index.write_bytes(index.read_bytes()[:20])
    assert len(store(tmp_path)) == 0


def test_rows_beyond_the_capacity_are_not_kept(tmp_path):
    full = store(tmp_path, capacity=3)
    full.add(b"a" * 16, torch.ones(2, 3))
    full.add(b"b" * 16, torch.ones(2, 3))
    assert b"a" * 16 in full
    assert b"b" * 16 not in full


# --- the command line


def run_train(tiny, rows, out, capsys, *flags):
    arguments = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--output_dir", str(out)]
    common = ["--late_layers_only", "--k", "2", "--num_train_epochs", "3", "--seed", "1"]
    assert main([*arguments, *common, "--save_strategy", "no", *flags]) == 0
    return capsys.readouterr().out


def test_train_caches_by_itself_and_gives_the_same_adapter(tiny, rows, tmp_path, capsys):
    cached = ["--cache_dir", str(tmp_path / "cache"), "--lora_dropout", "0.1"]
    output = run_train(tiny, rows, tmp_path / "a", capsys, *cached)
    assert "cache: up to" in output
    output = run_train(
        tiny, rows, tmp_path / "b", capsys, "--cache", "off", "--lora_dropout", "0.1"
    )
    assert "cache:" not in output
    from safetensors.torch import load_file

    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-4, atol=1e-6)
    output = run_train(tiny, rows, tmp_path / "c", capsys, *cached)
    assert "12 rows are there already" in output
    flags = ["--cache-dir", str(tmp_path / "cache")]
    assert main(["cache", "list", *flags]) == 0
    name = capsys.readouterr().out.split()[0]
    assert main(["cache", "clear", name, "--yes", *flags]) == 0
    assert main(["cache", "list", *flags]) == 0
    assert "no caches" in capsys.readouterr().out


def test_cache_on_says_why_it_cannot(tiny, rows, tmp_path, capsys):
    arguments = ["train", "--model_name_or_path", tiny, "--dataset", rows]
    assert main([*arguments, "--output_dir", str(tmp_path / "o"), "--cache", "on"]) == 2
    assert "cache: " in capsys.readouterr().err


@pytest.mark.parametrize(("cache", "status"), [("auto", 0), ("on", 2)])
def test_several_processes_do_without(tiny, rows, tmp_path, capsys, monkeypatch, cache, status):
    monkeypatch.setattr(SFTConfig, "world_size", 2)
    arguments = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--disable_tqdm"]
    arguments += ["--method", "none", "--num_train_epochs", "2", "--cache", cache]
    assert main([*arguments, "--output_dir", str(tmp_path / "o")]) == status
    said = capsys.readouterr()
    assert "it is for one process" in said.out + said.err


# --- `depthmix cache`


@pytest.fixture
def caches(tmp_path):
    """Two caches beside folders and files of others."""
    for name in ("a1", "b2"):
        made = store(tmp_path / "home" / name)
        made.add(b"a" * 16, torch.ones(2, 3))
        made.close()
    (tmp_path / "home" / "thesis").mkdir()
    (tmp_path / "home" / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "home" / "other-cache").mkdir()
    (tmp_path / "home" / "other-cache" / "CACHEDIR.TAG").write_text("Signature: another program")
    return tmp_path / "home"


def answer(monkeypatch, text):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _question: text)


def test_what_others_made_is_neither_listed_nor_removed(caches, capsys):
    assert main(["cache", "list", "--cache_dir", str(caches)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["a1", "b2"]
    for name in ("thesis", "other-cache", "../home/a1", ".."):
        assert main(["cache", "clear", name, "--yes", "--cache-dir", str(caches)]) == 2
    assert main(["cache", "clear", "--yes", "--cache-dir", str(caches)]) == 0
    assert sorted(path.name for path in caches.iterdir()) == ["other-cache", "thesis"]
    assert (caches / "thesis" / "chapter.tex").exists()


def test_a_file_of_others_in_a_cache_stays(caches, capsys):
    (caches / "a1" / "notes.txt").write_text("mine")
    assert main(["cache", "clear", "a1", "--yes", "--cache-dir", str(caches)]) == 0
    assert [path.name for path in (caches / "a1").iterdir()] == ["notes.txt"]
    assert f"{caches / 'a1'} stays, it holds notes.txt" in capsys.readouterr().out


@pytest.mark.parametrize(("said", "left"), [("y", 2), ("n", 4), ("", 4)])
def test_clear_lists_and_asks(caches, monkeypatch, capsys, said, left):
    answer(monkeypatch, said)
    assert main(["cache", "clear", "--cache-dir", str(caches)]) == (0 if said == "y" else 1)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:2]] == ["a1", "b2"]
    assert len(list(caches.iterdir())) == left


def test_clear_does_not_ask_where_nobody_answers(caches, capsys):
    assert main(["cache", "clear", "--cache-dir", str(caches)]) == 2
    assert "add --yes" in capsys.readouterr().err
    assert len(list(caches.iterdir())) == 4
