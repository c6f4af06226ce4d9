# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped, by Ctrl-C or kill -9, goes on as if it had not been: bit for bit, or not at all."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from train_tools import Run, launch, pair_rows, sft_rows, start_process, write_rows

from mlx_realign import UserError
from mlx_realign.config import TrainSettings
from mlx_realign.methods import sft
from mlx_realign.runfolder import RunFolder

EVERY_STEP = ("--save-every", 1)


@pytest.fixture
def split(tmp_path) -> Path:
    """Pairs with held-out ones."""
    write_rows(tmp_path / "split" / "train.jsonl", pair_rows(10))
    write_rows(tmp_path / "split" / "valid.jsonl", pair_rows(13)[10:])
    return tmp_path / "split"


def steps_of(run: Run) -> int:
    return run.steps[-1]["step"]


def rewind(folder: Path, step: int) -> None:
    """As a run that died after the checkpoint of `step`: later ones and the result are gone, rows are not."""
    for path in (folder / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    (folder / "adapters.safetensors").unlink()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("dpo", ("--gradient-accumulation", 2, "--eval-every", 2, "--warmup-steps", 2)),
        ("sft", ("--lora-dropout", 0.3)),
        ("dpo", ("--dora", "--optimizer", "muon")),
        ("dpo", ("--full", "--optimizer", "adafactor", "--learning-rate", 1e-4)),
    ],
    ids=["accumulation", "dropout", "dora-muon", "full"],
)
def test_going_on_equals_never_stopping(tiny_model_dir, tmp_path, split, method, words):
    """Rows equal but for what is measured, result equal byte for byte, from the middle of the second epoch."""
    data = split if method == "dpo" else write_rows(tmp_path / "sft.jsonl", sft_rows(10))
    words = (*words, *EVERY_STEP, "--keep", 100, "--epochs", 2)
    straight = launch(tmp_path / "straight" / "out", tiny_model_dir, data, *words, method=method)
    halted = launch(tmp_path / "halted" / "out", tiny_model_dir, data, *words, method=method)
    result = "model/model.safetensors" if "--full" in words else "adapters.safetensors"
    before = (straight.folder / result).read_bytes()
    assert (halted.folder / result).read_bytes() == before  # two straight runs are one and the same, to begin with
    half = straight.rows
    (halted.folder / "adapters.safetensors").touch()
    rewind(halted.folder, steps_of(straight) // 2 + 1)
    again = launch(halted.folder, tiny_model_dir, data, *words, "--resume", method=method)
    assert (again.folder / result).read_bytes() == before
    assert again.steps == straight.steps
    assert again.evaluations == straight.evaluations
    assert [row["step"] for row in again.rows] == [row["step"] for row in half]


def test_a_write_that_was_cut_in_the_middle_does_not_count(tiny_model_dir, tmp_path, split):
    """A half-written checkpoint under its temporary name, and half a line of metrics, as kill -9 leaves them."""
    words = (*EVERY_STEP, "--keep", 100, "--steps", 6)
    run = launch(tmp_path / "out", tiny_model_dir, split, *words)
    straight, before = run.steps, run.adapter
    rewind(run.folder, 3)
    checkpoints, metrics = run.folder / "checkpoints", run.folder / "metrics.jsonl"
    (checkpoints / "step-000003").rename(checkpoints / ".step-000004.tmp")
    (checkpoints / ".step-000004.tmp" / "state.json").unlink()
    (checkpoints / ".step-000004.tmp" / "optimizer.safetensors").write_bytes(b"\x10")
    metrics.write_text(metrics.read_text()[:-40])
    again = launch(run.folder, tiny_model_dir, split, *words, "--resume")
    assert again.steps == straight and again.adapter == before
    assert not list(checkpoints.glob(".*"))


def test_a_run_that_died_before_its_first_checkpoint_begins_again(tiny_model_dir, tmp_path, split):
    words = ("--save-every", 100, "--steps", 3)
    run = launch(tmp_path / "out", tiny_model_dir, split, *words)
    straight, before = run.steps, run.adapter
    rewind(run.folder, 0)
    again = launch(run.folder, tiny_model_dir, split, *words, "--resume")
    assert again.steps == straight and again.adapter == before


def test_going_on_after_the_end_changes_nothing(tiny_model_dir, tmp_path, split, capsys):
    run = launch(tmp_path / "out", tiny_model_dir, split, "--steps", 3)
    rows, before = run.rows, run.adapter
    capsys.readouterr()
    again = launch(run.folder, tiny_model_dir, split, "--steps", 3, "--resume")
    assert again.rows == rows and again.adapter == before
    assert "going on after step 3 of 3" in capsys.readouterr().out


def test_kill_9_at_any_moment(tiny_model_dir, tmp_path, split):
    """Processes that write a checkpoint at every step, killed at random moments, then one that is left alone."""
    words = (*EVERY_STEP, "--keep", 2, "--steps", 40, "--eval-every", 3)
    straight = launch(tmp_path / "straight" / "out", tiny_model_dir, split, *words)
    folder = tmp_path / "killed" / "out"
    rng = random.Random(0)
    reached = []
    for _ in range(3):
        resume = ("--resume",) if (folder / "metrics.jsonl").exists() else ()
        process = start_process(folder, tiny_model_dir, split, *words, *resume)
        began = len((folder / "metrics.jsonl").read_bytes()) if resume else 0
        while process.poll() is None and (
            not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_bytes()) <= began
        ):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        reached.append(process.returncode)
    assert -signal.SIGKILL in reached  # a machine that finished all 40 steps in between would prove nothing
    last = launch(folder, tiny_model_dir, split, *words, "--resume")
    assert last.code == 0
    assert last.steps == straight.steps
    assert last.evaluations == straight.evaluations
    assert last.adapter == straight.adapter
    assert last.checkpoints == straight.checkpoints


def test_ctrl_c_saves_and_exits_130_and_the_run_goes_on(tiny_model_dir, tmp_path, split):
    words = ("--save-every", 1000, "--steps", 36)
    straight = launch(tmp_path / "straight" / "out", tiny_model_dir, split, *words)
    folder = tmp_path / "stopped" / "out"
    process = start_process(folder, tiny_model_dir, split, *words)
    while process.poll() is None and (
        not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_bytes()) < 500
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    stopped = Run(130, folder)
    step = steps_of(stopped)
    assert 0 < step < 36 and stopped.checkpoints == [step]
    assert f"interrupted after step {step}; go on with --resume" in err
    assert "stopping after this step" in err and "interrupted" not in out
    again = launch(folder, tiny_model_dir, split, *words, "--resume")
    assert again.steps == straight.steps and again.adapter == straight.adapter


def test_other_settings_or_data_are_refused_by_name(tiny_model_dir, model_folder, tmp_path, split):
    words = ("--steps", 4, "--keep", 3, *EVERY_STEP)
    run = launch(tmp_path / "out", tiny_model_dir, split, *words)
    rewind(run.folder, 2)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}

    def refused(*said: str, model: Path = tiny_model_dir, data: Path = split, flags: tuple[object, ...] = ()) -> None:
        with pytest.raises(UserError) as error:
            launch(run.folder, model, data, *words, "--resume", *flags)
        for part in (str(run.folder), "was made with other data or settings", *said):
            assert part in str(error.value)
        assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before

    refused("--seed was 0 and is now 1", "--beta was its default and is now 0.3", flags=("--seed", 1, "--beta", 0.3))
    refused("--loss-type was sigmoid and is now sigmoid,sft", flags=("--loss-type", "sigmoid,sft"))
    refused("--lora-rank was 4 and is now 8", flags=("--lora-rank", 8))
    refused("--model has other weights", model=model_folder("llama", seed=5))
    other = write_rows(tmp_path / "other" / "train.jsonl", pair_rows(9)).parent
    refused("--data has other rows", "--eval-data has other rows", data=other)
    refused("--method was dpo and is now sft", flags=("--method", "sft", "--data", write_sft(tmp_path)))
    moved = tmp_path / "moved"
    split.rename(moved)  # the same rows elsewhere are the same rows
    assert launch(run.folder, tiny_model_dir, moved, *words, "--resume", "--keep", 1).code == 0


def write_sft(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "sft.jsonl", sft_rows(10))


def test_nothing_to_go_on_with_is_said(tiny_model_dir, tmp_path, split):
    with pytest.raises(UserError, match="--resume: .*out holds no run to go on with"):
        launch(tmp_path / "out", tiny_model_dir, split, "--resume")
    run = launch(tmp_path / "out", tiny_model_dir, split, "--steps", 1)
    (run.folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is missing or damaged"):
        launch(run.folder, tiny_model_dir, split, "--steps", 1, "--resume")


def test_an_old_checkpoint_serves_where_the_newest_is_deleted(tiny_model_dir, tmp_path, split):
    words = (*EVERY_STEP, "--steps", 4)
    run = launch(tmp_path / "out", tiny_model_dir, split, *words)
    straight, before = run.steps, run.adapter
    broken = run.folder / "checkpoints" / "step-000004"
    (broken / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="step-000004 is damaged .*delete that folder to go on from the one before"):
        launch(run.folder, tiny_model_dir, split, *words, "--resume")
    for file in broken.iterdir():
        file.unlink()
    broken.rmdir()
    again = launch(run.folder, tiny_model_dir, split, *words, "--resume")
    assert again.steps == straight and again.adapter == before
    assert json.loads((run.folder / "checkpoints" / "step-000004" / "state.json").read_text())["step"] == 4


def test_a_checkpoint_of_another_run_is_refused(tiny_model_dir, tmp_path, split):
    words = (*EVERY_STEP, "--steps", 3)
    run = launch(tmp_path / "a" / "out", tiny_model_dir, split, *words)
    other = launch(tmp_path / "b" / "out", tiny_model_dir, split, *words, "--seed", 7)
    shutil.rmtree(run.folder / "checkpoints" / "step-000003")
    shutil.copytree(other.folder / "checkpoints" / "step-000003", run.folder / "checkpoints" / "step-000003")
    with pytest.raises(UserError, match="step-000003 is of another run"):
        launch(run.folder, tiny_model_dir, split, *words, "--resume")


def test_a_checkpoint_too_many_of_a_killed_run_goes(tiny_model_dir, tmp_path, split):
    """Killed after a checkpoint got its name and before the oldest went."""
    words = (*EVERY_STEP, "--keep", 2, "--steps", 4)
    run = launch(tmp_path / "out", tiny_model_dir, split, *words)
    kept = run.checkpoints
    shutil.copytree(run.folder / "checkpoints" / "step-000003", run.folder / "checkpoints" / "step-000001")
    assert launch(run.folder, tiny_model_dir, split, *words, "--resume").checkpoints == kept


def test_a_resumed_run_keeps_sample_rows_whatever_characters_they_hold(tmp_path):
    """U+2028, U+0085 and others end lines for `str.splitlines`, not in JSON lines."""
    settings = TrainSettings(model="m", data="rows", output=str(tmp_path))
    folder = RunFolder(settings, "sft", sft.Config())
    texts = ["a\u2028b", "a\x85b", "a\x0b\x0c\x1c\x1d\x1e\u2029b", "plain"]
    folder.keep_samples([{"step": 1 + i // 3, "completion": text, "loss": 0.5} for i, text in enumerate(texts)])
    before = folder.samples_path.read_bytes()
    folder.metrics_path.write_text(json.dumps({"step": 1, "loss": 1, "x": "\u2028"}, ensure_ascii=False) + "\n")
    with folder.samples_path.open("ab") as file:
        file.write(b'{"step": 2, "comp')
    folder._cut(folder.samples_path, 2)
    assert folder.samples_path.read_bytes() == before
    folder._cut(folder.samples_path, 1)
    assert len(folder.samples_path.read_bytes().split(b"\n")) == 3 + 1
    assert folder.last_row()["x"] == "\u2028"
