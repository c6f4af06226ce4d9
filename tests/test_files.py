# SPDX-License-Identifier: Apache-2.0
"""What a command writes appears whole, under a name that nobody took meanwhile, and two do not write the same."""

import errno
import os
from pathlib import Path

import pytest

from mlx_realign import UserError, files, locks


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_at_the_end(tmp_path):
    with files.new_folder(tmp_path / "out") as draft:
        (draft / "weights").write_text("w")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["weights"]


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), files.new_folder(tmp_path / "out") as draft:
        (draft / "weights").write_text("w")
        raise KeyError
    with pytest.raises(KeyError), files.new_path(tmp_path / "file.gguf") as part:
        part.write_text("x")
        raise KeyError
    assert names(tmp_path) == []


def test_a_writer_that_fails_is_told_and_other_errors_are_their_own(tmp_path):
    with pytest.raises(UserError, match="out: cannot be written: is the disk full"), files.new_folder(tmp_path / "out"):
        raise RuntimeError("[write] Unable to write 2219 bytes to file.")
    with (
        pytest.raises(UserError, match="out: cannot be written: No space"),
        files.new_folder(tmp_path / "out") as draft,
    ):
        raise OSError(errno.ENOSPC, "No space left on device", str(draft / "x"))
    with pytest.raises(FileNotFoundError), files.new_folder(tmp_path / "out"):
        (tmp_path / "input").read_text()
    with pytest.raises(RuntimeError, match="shapes"), files.new_path(tmp_path / "out"):
        raise RuntimeError("shapes differ")


def test_the_second_of_two_is_refused_at_once_and_the_first_is_not_disturbed(tmp_path):
    with files.new_folder(tmp_path / "out") as draft:
        (draft / "weights").write_text("first")
        with pytest.raises(UserError, match=f"out: process {os.getpid()} .*is writing there"):
            with files.new_folder(tmp_path / "out"):
                pass
    assert (tmp_path / "out" / "weights").read_text() == "first"


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / ".out.draft"
    (left / "shards").mkdir(parents=True)
    (left / "shards" / "half").write_text("half")
    (left / ".lock").write_text('{"pid": 1, "host": "x"}')
    with files.new_folder(tmp_path / "out") as draft:
        (draft / "weights").write_text("w")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["weights"]


def test_an_empty_folder_will_do_and_any_other_not(tmp_path):
    (tmp_path / "empty").mkdir()
    with files.new_folder(tmp_path / "empty") as draft:
        (draft / "a").write_text("a")
    with pytest.raises(UserError, match="exists"), files.new_folder(tmp_path / "empty"):
        pass
    with pytest.raises(UserError, match="out"), files.new_folder(tmp_path / "out") as draft:
        (draft / "b").write_text("b")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("another's")
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path, monkeypatch, links):
    if not links:

        def link(*_: object) -> None:
            raise PermissionError

        monkeypatch.setattr(os, "link", link)
    with files.new_path(tmp_path / "a.txt") as part:
        part.write_text("mine")
    assert (tmp_path / "a.txt").read_text() == "mine"
    with pytest.raises(UserError, match="exists already"), files.new_path(tmp_path / "b.txt") as part:
        part.write_text("second")
        (tmp_path / "b.txt").write_text("first")
    assert (tmp_path / "b.txt").read_text() == "first"
    assert names(tmp_path) == ["a.txt", "b.txt"]


def test_a_folder_that_cannot_be_replaced_is_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # as where a file system is mounted, no other folder can take its place
    (tmp_path / files.DRAFT).mkdir()
    (tmp_path / files.DRAFT / "left").write_text("by a killed process")
    with files.new_folder(Path(".")) as draft:
        (draft / "weights").write_text("whole")
        (draft / "inner").mkdir()
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(".")) == ["inner", "weights"]
    with pytest.raises(UserError, match="exists"), files.new_folder(Path(".")):
        pass


def test_a_name_that_is_not_utf8_is_refused_before_anything_is_made(tmp_path):
    path = tmp_path / os.fsdecode(b"a\xff")
    for make in (files.new_folder, files.new_file, locks.only_writer):
        with pytest.raises(UserError, match="not valid UTF-8"), make(path):
            pass
    assert not any(tmp_path.iterdir())
