# SPDX-License-Identifier: Apache-2.0
"""One writer in a folder: another one is refused and named, one that was killed is recognised."""

import errno
import fcntl
import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from train_tools import launch, pair_rows, write_rows

from mlx_realign import UserError, locks

HOLD = """
import sys, time
from pathlib import Path
from mlx_realign import locks
with locks.only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds `tmp_path / "out"`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_another_process_is_named_until_it_is_killed(tmp_path, holder):
    folder = tmp_path / "out"
    with pytest.raises(UserError, match=f"process {holder.pid} on {platform.node()}.*is writing there"):
        with locks.only_writer(folder):
            pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locks.only_writer(folder) as left:
        assert left and f"process {holder.pid}" in left
    with locks.only_writer(folder) as left:
        assert left is None


def test_a_second_run_into_a_folder_is_refused_before_its_model_is_loaded(tiny_model_dir, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", pair_rows(8))
    folder = tmp_path / "out"
    with locks.only_writer(folder):
        with pytest.raises(UserError, match=f"process {os.getpid()} "):
            launch(folder, tmp_path / "no-such-model", pairs, "--steps", 1)
    run = launch(folder, tiny_model_dir, pairs, "--steps", 1)
    assert run.code == 0 and not (folder / locks.NAME).exists()
    with locks.only_writer(folder), pytest.raises(UserError, match="is writing there"):
        launch(folder, tiny_model_dir, pairs, "--steps", 1, "--resume")


def test_a_run_that_is_refused_leaves_no_folder(tiny_model_dir, tmp_path):
    with pytest.raises(UserError):
        launch(tmp_path / "out", tiny_model_dir, tmp_path / "no-such-file.jsonl", "--steps", 1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("holder", "refused"),
    [
        ({"pid": os.getpid(), "host": platform.node()}, True),
        ({"pid": 2**22 + 5, "host": platform.node()}, False),  # above Linux's and macOS's largest process id
        ({"pid": 1, "host": "elsewhere"}, True),
        ({"pid": 10**30, "host": platform.node()}, True),
        ({}, False),
    ],
    ids=["alive", "gone", "of another machine", "no number of a process", "empty"],
)
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EPERM, 95, 102], ids=errno.errorcode.get)
def test_where_the_file_system_knows_no_locks_the_file_is_judged(tmp_path, monkeypatch, holder, refused, number):
    def flock(handle: int, operation: int) -> None:
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / locks.NAME).write_text(json.dumps(holder))
    if refused:
        with pytest.raises(UserError, match="is writing there"), locks.only_writer(tmp_path):
            pass
        assert json.loads((tmp_path / locks.NAME).read_text()) == holder
    else:
        with locks.only_writer(tmp_path) as left:
            assert bool(left) == bool(holder)
        assert not (tmp_path / locks.NAME).exists()


def test_a_link_at_the_locks_place_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("mine")
    (tmp_path / locks.NAME).symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="--output .*cannot be written"), locks.only_writer(tmp_path):
        pass
    assert (tmp_path / "other").read_text() == "mine"


@pytest.mark.parametrize("text", [b"[" * 4000, b"\xff\xfe", b"[]", b""])
def test_a_lock_file_that_says_nothing_is_taken_over(tmp_path, text):
    (tmp_path / locks.NAME).write_bytes(text)
    with locks.only_writer(tmp_path) as left:
        assert left is None


def test_a_link_to_nothing_is_called_so(tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    for folder, named in ((tmp_path / "out", ""), (tmp_path / "out" / "deeper", f"{tmp_path / 'out'} ")):
        with pytest.raises(UserError, match=f"output {folder}: {named}is a link to nothing"), locks.only_writer(folder):
            pass
