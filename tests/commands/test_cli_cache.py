"""`depthmix cache`: only what depthmix made is listed or removed."""

import pytest
import torch

from depthmix.cache.store import StateStore
from depthmix.cli import main


def store(folder):
    return StateStore(folder, 3, torch.float32, 10)


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
