# SPDX-License-Identifier: Apache-2.0
"""How a command ends from outside: signals, a terminal that goes away, output that nobody reads."""

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from train_tools import ROOT, launch, pair_rows, words_of, write_rows

from mlx_realign import cli, ends, streams


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", pair_rows(8))


def after_first_row(folder: Path, act) -> threading.Thread:
    """Call `act` once a run has written a row of metrics."""

    def watch() -> None:
        metrics = folder / "metrics.jsonl"
        for _ in range(3000):
            if metrics.exists() and metrics.stat().st_size:
                act()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_with_a_checkpoint_and_its_own_code(tiny_model_dir, tmp_path, pairs, capsys, number, code):
    folder = tmp_path / "out"
    after_first_row(folder, lambda: os.kill(os.getpid(), number))
    run = launch(folder, tiny_model_dir, pairs, "--steps", 400, "--save-every", 1000)
    assert run.code == code
    assert run.checkpoints == [run.steps[-1]["step"]]
    assert run.steps[-1]["step"] < 400
    assert not (folder / ".lock").exists()
    assert signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_before_the_first_step_undoes_and_has_the_same_code(capsys, number, code):
    left = []

    def main(words: list[str]) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        finally:
            left.append("undone")
        return 0

    assert cli.run(main, []) == code
    assert left == ["undone"]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ends.raised(), ends.noted("") as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_goes_away_leaves_a_checkpoint(tiny_model_dir, tmp_path, pairs):
    folder, (ours, theirs) = tmp_path / "out", pty.openpty()
    words = words_of(folder, tiny_model_dir, pairs, "--steps", 4000, "--save-every", 10000)
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_realign.train", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=ROOT,
        env=os.environ | {"MLX_REALIGN_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "TERM": "xterm"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    reader = threading.Thread(target=_drain, args=(ours, folder), daemon=True)
    reader.start()
    assert process.wait(60) == 129
    assert len(list((folder / "checkpoints").glob("step-*"))) == 1


def _drain(terminal: int, folder: Path) -> None:
    """Read what comes until the run has begun, then close the terminal."""
    while not ((folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size):
        os.read(terminal, 65536)
    os.close(terminal)


@contextmanager
def stdout(target: int) -> Iterator[None]:
    """Standard output of this process's Python is this descriptor."""
    before, sys.stdout = sys.stdout, os.fdopen(target, "w")
    try:
        yield
    finally:
        sys.stdout, ended = before, sys.stdout
        ended.close()


def without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_a_run_without_a_reader_goes_on_to_its_end(tiny_model_dir, tmp_path, pairs):
    with stdout(without_reader()):
        run = launch(tmp_path / "out", tiny_model_dir, pairs, "--steps", 3)
    assert run.code == 0 and len(run.steps) == 3 and run.adapter


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_somebody_waits_for_and_that_is_lost_makes_the_code_1(tiny_model_dir, tmp_path, pairs, capsys):
    words = ["train", *words_of(tmp_path / "out", tiny_model_dir, pairs, "--steps", "2")]
    with stdout(os.open("/dev/full", os.O_WRONLY)):
        assert cli.entry(words) == 1
    assert (tmp_path / "out" / "adapters.safetensors").exists()
    assert "standard output" in capsys.readouterr().err


def test_a_command_that_only_prints_ends_with_its_reader():
    printed = []

    def main(words: list[str]) -> int:
        streams.ends_with_reader()
        for i in range(100_000):
            print(i)
            printed.append(i)
        return 3

    with stdout(without_reader()):
        assert cli.run(main, []) == 0
    assert len(printed) < 100_000


def test_a_closed_standard_output_is_no_fault(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.entry(["--help"]) == 0


def test_a_handler_of_a_program_around_python_is_left_alone(monkeypatch):
    usual = signal.getsignal(signal.SIGHUP)
    foreign = lambda number: None if number == signal.SIGTERM else usual  # noqa: E731 - as where C has set one
    monkeypatch.setattr(signal, "getsignal", foreign)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with ends.noted("stopping"):
            assert signal.signal(signal.SIGTERM, signal.SIG_DFL) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_home_of_nobody_is_one_message(capsys):
    assert cli.entry(["generate", "--model", "~no-such-user/model", "--prompt", "a"]) == 2
    assert "begins with ~" in capsys.readouterr().err
