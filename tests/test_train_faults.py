# SPDX-License-Identifier: Apache-2.0
"""A run that cannot go on says at which step, why and with which rows, exits with 1, and leaves its last good state."""

import json
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from train_tools import cache, launch, pair_rows, sft_rows, words_of, write_rows

from mlx_realign import UserError, checkpoint, data, guard
from mlx_realign.batch import Batch, LossOutput, Scores
from mlx_realign.config import TrainSettings
from mlx_realign.methods import sft
from mlx_realign.policy import Policy
from mlx_realign.progress import Reporter
from mlx_realign.runfolder import RunFolder
from mlx_realign.train import Loop, main


@pytest.fixture
def pairs(tmp_path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", pair_rows(8))


def test_nan_stops_with_the_step_the_metric_and_the_lines(tiny_model_dir, tmp_path, pairs, capsys):
    """An absurd learning rate: the first step moves every weight by about 1e30, the second step's loss is NaN."""
    words = ("--optimizer", "sgd", "--learning-rate", 1e30, "--no-shuffle", "--save-every", 1, "--steps", 4)
    run = launch(tmp_path / "out", tiny_model_dir, pairs, *words)
    out, err = capsys.readouterr()
    assert run.code == 1
    assert err.startswith(
        "stopped: step 2: loss is nan; rows at lines 3, 4. Look at these rows, or lower --learning-rate"
    )
    newest = run.folder / "checkpoints" / "step-000001"
    assert f"The newest checkpoint is {newest}" in err and "Traceback" not in err
    assert [row["step"] for row in run.rows] == [1]
    assert checkpoint.read_state(newest)["step"] == 1
    assert not (run.folder / "adapters.safetensors").exists()


def test_json_says_the_fault_as_json(tiny_model_dir, tmp_path, pairs, capsys):
    run = launch(tmp_path / "out", tiny_model_dir, pairs, "--optimizer", "sgd", "--learning-rate", 1e30, "--json")
    out, err = capsys.readouterr()
    assert (run.code, err) == (1, "")
    assert json.loads(out.splitlines()[-1])["error"].startswith("stopped: step 2: loss is nan")


def test_only_the_micro_batch_that_is_not_finite_is_named():
    norms = guard.Norms()
    with pytest.raises(guard.Fault, match="step 5: loss is nan; rows at lines 7, 9\\."):
        norms.refuse(5, math.nan, 1.0, [([1, 2], mx.array(1.0)), ([9, 7], mx.array(math.nan))])
    with pytest.raises(guard.Fault, match="grad_norm is inf; rows at lines 1, 2, 7, 9\\."):
        norms.refuse(5, 1.0, math.inf, [([1, 2], mx.array(1.0)), ([9, 7], mx.array(1.0))])


def test_a_norm_a_thousand_times_the_usual_is_an_explosion():
    norms, lines = guard.Norms(), [([3, 4], mx.array(1.0))]
    norms.refuse(1, 1.0, 50_000.0, lines)  # nothing is usual yet
    for step in range(2, 12):
        norms.refuse(step, 1.0, 2.0, lines)
    norms.refuse(12, 1.0, 1999.0, lines)
    with pytest.raises(guard.Fault, match="step 13: grad_norm is 2001, 1000 times the usual 2; rows at lines 3, 4"):
        norms.refuse(13, 1.0, 2001.0, lines)


def test_a_new_row_after_many_known_ones_is_no_explosion():
    norms, lines = guard.Norms(), [([3], mx.array(1.0))]
    for step in range(1, 301):
        norms.refuse(step, 1.0, 5.0 if step <= 20 else 1e-4, lines)
    norms.refuse(301, 1.0, 50.0, lines)
    with pytest.raises(guard.Fault, match="grad_norm is 5001, 1000 times the usual 5"):
        norms.refuse(302, 1.0, 5001.0, lines)


def test_a_policy_that_cannot_learn_any_more_is_told_and_one_that_has_learned_is_not():
    norms, lines = guard.Norms(), [([3], mx.array(5.0))]
    for step in range(1, 40):
        norms.refuse(step, 0.0, 0.0, lines)  # a hinge that all pairs are beyond, groups whose rewards are alike
    for step in range(40, 49):
        norms.refuse(step, 5.0, 0.0, lines)
    norms.refuse(49, 5.0, 1e-8, lines)
    for step in range(50, 59):
        norms.refuse(step, 5.0, 0.0, lines)
    with pytest.raises(guard.Fault, match="step 59: the gradient has been zero for 10 steps, although the loss is 5"):
        norms.refuse(59, 5.0, 0.0, lines)


def test_a_clock_that_goes_back_is_not_noticed(tiny_model_dir, tmp_path, pairs, monkeypatch):
    began = time.time()
    went = iter(range(1, 10**6))
    monkeypatch.setattr(time, "time", lambda: began - 3600 * next(went))
    run = launch(tmp_path / "out", tiny_model_dir, pairs, "--steps", 3, "--save-every", 1)
    assert run.code == 0 and len(run.steps) == 3
    assert all(row["step_s"] > 0 for row in run.rows if "loss" in row)


def test_a_state_that_is_not_finite_never_becomes_a_checkpoint(tiny_model_dir, tmp_path):
    weights = {"a": mx.zeros((2,)), "b": {"c": mx.array([1.0, math.inf])}}
    with pytest.raises(guard.Fault, match="step 3: 1 trained tensors hold NaN or infinity, b.c among them"):
        guard.refuse_broken_weights(3, weights)
    guard.refuse_broken_weights(3, {"a": mx.zeros((2,))})


def test_a_held_out_loss_that_is_not_finite_names_the_rows(tiny_model_dir, tmp_path, pairs, capsys):
    held_out = write_rows(tmp_path / "valid.jsonl", pair_rows(3))
    words = ("--optimizer", "sgd", "--learning-rate", 1e30, "--eval-data", held_out, "--eval-every", 1)
    run = launch(tmp_path / "out", tiny_model_dir, pairs, *words)
    assert run.code == 1
    assert "stopped: step 1: eval_loss is nan; held-out rows at lines 1, 2." in capsys.readouterr().err
    assert run.checkpoints == []


def test_a_zero_gradient_is_told_after_the_first_step(tiny_model_dir, tmp_path, pairs, capsys):
    """A beta that is 0 in float32; the decay would still move the weights, so that a change alone proves nothing."""
    run = launch(tmp_path / "out", tiny_model_dir, pairs, "--beta", 1e-60, "--weight-decay", 0.1)
    assert run.code == 1
    assert "stopped: step 1: the gradient is zero, so nothing would be learned" in capsys.readouterr().err


def test_a_step_that_is_lost_in_rounding_is_told(tiny_model_dir, tmp_path, pairs, capsys):
    words = ("--full", "--dtype", "bfloat16", "--learning-rate", 1e-30, "--optimizer", "sgd")
    run = launch(tmp_path / "out", tiny_model_dir, pairs, *words)
    assert run.code == 1
    assert "no trained weight moved, although the gradient's norm is" in capsys.readouterr().err


def run_with(loss: Callable[[Policy, Scores, Batch], LossOutput], model: Path, folder: Path) -> None:
    """One step of a method made of this loss, on four rows."""
    settings = TrainSettings(model=str(model), data="rows", output=str(folder / "out"), steps=1)
    with cache(folder / "cache"), Reporter() as reporter:
        policy = Policy.from_settings(settings)
        rows = data.load(sft_rows(4), policy.tokenizer, format="sft", settings=settings)
        bound = lambda scores, batch, config: loss(policy, scores, batch)  # noqa: E731
        method = SimpleNamespace(loss=bound, reference=lambda own: None, LEARNING_RATE=1e-3, FORMAT="sft")
        output = RunFolder(settings, "sft", sft.Config())
        loop = Loop(policy, method, sft.Config(), settings, rows, None, output, reporter)
        output.open(loop.identity, {})
        loop.run()


def test_a_first_step_that_moves_the_base_is_told(tiny_model_dir, tmp_path):
    """A loss with a side effect: it changes one entry of one frozen matrix."""

    def loss(policy: Policy, scores: Scores, batch: Batch) -> LossOutput:
        linear = dict(policy.model.named_modules())["model.layers.0.mlp.up_proj"].linear
        linear.weight = linear.weight.at[3, 4].add(1e-6)
        mx.eval(linear.weight)
        return sft.loss(scores, batch, sft.Config())

    with pytest.raises(guard.Fault, match="step 1: the optimizer moved weights of the frozen base"):
        run_with(loss, tiny_model_dir, tmp_path)


def test_a_gpu_that_runs_out_of_memory_is_told_and_other_errors_are_left_alone(tiny_model_dir, tmp_path):
    """The words are Metal's; on a CPU the system ends the process instead."""

    def greedy(policy: Policy, scores: Scores, batch: Batch) -> LossOutput:
        raise RuntimeError("[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum of 9.")

    def broken(policy: Policy, scores: Scores, batch: Batch) -> LossOutput:
        raise RuntimeError("a bug")

    with pytest.raises(guard.Fault, match="step 1: out of memory .*99 bytes.* Lower --batch-size.* no checkpoint yet"):
        run_with(greedy, tiny_model_dir, tmp_path)
    with pytest.raises(RuntimeError, match="^a bug$"):  # nothing was done in that folder, so it can be used again
        run_with(broken, tiny_model_dir, tmp_path)


def test_a_memory_limit_that_does_not_hold_is_said_once(tiny_model_dir, tmp_path, pairs, capsys):
    limits = mx.set_memory_limit(1 << 40), mx.set_cache_limit(1 << 40)
    try:
        run = launch(tmp_path / "out", tiny_model_dir, pairs, "--memory-limit", 0.001, "--steps", 3)
    finally:
        mx.set_memory_limit(limits[0])
        mx.set_cache_limit(limits[1])
    said = [line for line in capsys.readouterr().out.splitlines() if "--memory-limit" in line]
    peak = run.rows[0]["peak_memory_gb"]
    assert len(said) == 1 and said[0].startswith(f"a step took {peak:.2f} GB, more than --memory-limit 0.001:")


def test_a_full_disk_is_told_and_the_last_good_checkpoint_goes_on(tiny_model_dir, tmp_path, pairs, capsys):
    """The system lets no file grow beyond 50 KB, so the third checkpoint does not fit; then there is room again."""
    words = ("--save-every", 1, "--keep", 9, "--steps", 4)
    straight = launch(tmp_path / "straight" / "out", tiny_model_dir, pairs, *words)
    run = launch(tmp_path / "full" / "out", tiny_model_dir, pairs, *words)
    for step in (3, 4):
        folder = run.folder / "checkpoints" / f"step-{step:06d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    (run.folder / "adapters.safetensors").unlink()
    capsys.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        full = launch(run.folder, tiny_model_dir, pairs, *words, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert full.code == 1 and full.checkpoints == [1, 2]
    assert err.startswith(f"stopped: {run.folder / 'checkpoints' / 'step-000003'} cannot be written: ")
    assert "Mend that and go on with --resume. The newest checkpoint is" in err and "step-000002" in err
    again = launch(run.folder, tiny_model_dir, pairs, *words, "--resume")
    assert again.code == 0 and again.steps == straight.steps and again.adapter == straight.adapter


def test_a_result_that_does_not_fit_leaves_the_checkpoint(tiny_model_dir, tmp_path, pairs, capsys):
    run = launch(tmp_path / "out", tiny_model_dir, pairs, "--steps", 2)
    (run.folder / "adapters.safetensors").unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
    try:
        assert launch(run.folder, tiny_model_dir, pairs, "--steps", 2, "--resume").code == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"stopped: {run.folder} cannot be written: " in capsys.readouterr().err
    assert launch(run.folder, tiny_model_dir, pairs, "--steps", 2, "--resume").code == 0
    assert run.adapter == (run.folder / "checkpoints" / "step-000002" / "adapters.safetensors").read_bytes()


def test_an_output_that_cannot_be_made_is_the_users_to_mend(tiny_model_dir, tmp_path, pairs):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output .*file: is a file; name a folder"):
        launch(tmp_path / "file", tiny_model_dir, pairs)
    words = words_of(tmp_path / "file" / "out", tiny_model_dir, pairs)
    with cache(tmp_path), pytest.raises(UserError, match="--output .*file is a file; name a folder"):
        main(words)
