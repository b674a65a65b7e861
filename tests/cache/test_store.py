"""`StateStore`: what is written is there, for others too; what a crash leaves is not read."""

import signal
import subprocess
import sys

import pytest
import torch

from depthmix.cache.store import StateStore


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


def test_what_is_written_is_seen_by_others_before_it_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("depthmix.cache.store.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("depthmix.cache.store.LOOK_SECONDS", 0.0)
    writer, reader = store(tmp_path), store(tmp_path)
    for name, tokens in ((b"a" * 16, 2), (b"b" * 16, 3)):
        assert not reader.knows([name])
        states = torch.randn(tokens, 3)
        writer.add(name, states)
        assert writer.knows([name])
        writer._background.submit(lambda: None).result()  # the index is written in the background
        assert reader.knows([name])
        assert torch.equal(reader.get(name), states)
    writer.close()
    assert torch.equal(reader.get(b"b" * 16), states)


def test_segments_are_begun_as_they_are_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("depthmix.cache.store.SEGMENT_BYTES", 5 * 3 * 4)
    rows = {bytes([i] * 16): torch.randn(count, 3) for i, count in enumerate((2, 2, 2, 9, 1))}
    first = store(tmp_path, capacity=None)
    for digest, states in rows.items():
        first.add(digest, states)
    first.close()
    sizes = [path.stat().st_size for path in tmp_path.glob("*.states")]
    assert sorted(sizes) == [1 * 12, 2 * 12, 4 * 12, 9 * 12]
    second = store(tmp_path)
    assert second.tokens == 16
    assert all(torch.equal(second.get(digest), states) for digest, states in rows.items())


_KILLED = """
import os, signal, sys, torch
from pathlib import Path
import depthmix.cache.store as module
module.SAVE_SECONDS = module.LOOK_SECONDS = 0.0
store = module.StateStore(Path(sys.argv[1]), 3, torch.float32, 10**5)
store.add(b"a" * 16, torch.ones(2, 3))
if sys.argv[2] == "indexed":
    store.knows([])
    store._background.submit(lambda: None).result()
store.add(b"b" * 16, torch.ones(2, 3))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("kind", "size"), [("indexed", 2 * 3 * 4), ("new", None)])
def test_a_killed_process_leaves_what_has_an_index_and_takes_no_room(tmp_path, kind, size):
    command = [sys.executable, "-c", _KILLED, str(tmp_path), kind]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.glob("*.states")
    assert left.stat().st_size == 10**5 * 3 * 4
    after = store(tmp_path)
    assert [name in after for name in (b"a" * 16, b"b" * 16)] == [kind == "indexed", False]
    assert [path.stat().st_size for path in tmp_path.glob("*.states")] == ([size] if size else [])


def test_what_another_process_is_writing_is_left_alone(tmp_path):
    first = store(tmp_path)
    first.add(b"a" * 16, torch.ones(2, 3))
    store(tmp_path)
    first.close()
    assert len(store(tmp_path)) == 1


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
    full.close()
    assert b"a" * 16 in full
    assert b"b" * 16 not in full
