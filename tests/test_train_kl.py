# SPDX-License-Identifier: Apache-2.0
"""KL to the start in a run: what rows say against mlx-lm's own logits, what each --kl-action does and leaves behind."""

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load as mlx_lm_load
from test_train_resume import rewind
from train_tools import Run, largest_difference, launch, pair_rows, tensors, write_rows

from mlx_realign import UserError, checkpoint

FLAT = ("--lr-schedule", "constant", "--kl-every", 1)


@pytest.fixture
def pairs(tmp_path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", pair_rows(8))


@pytest.fixture(scope="module")
def free(tiny_model_dir, tmp_path_factory) -> Run:
    """Twelve steps on `pairs` with every state kept and nobody interfering."""
    folder = tmp_path_factory.mktemp("free")
    data = write_rows(folder / "pairs.jsonl", pair_rows(8))
    return launch(folder / "out", tiny_model_dir, data, "--steps", 12, "--save-every", 1, "--keep", 99, *FLAT)


@pytest.fixture
def split(tmp_path) -> Path:
    """Pairs with held-out ones."""
    write_rows(tmp_path / "split" / "train.jsonl", pair_rows(8))
    write_rows(tmp_path / "split" / "valid.jsonl", pair_rows(11)[8:])
    return tmp_path / "split"


def kls(run: Run) -> dict[int, float]:
    """Step -> KL to the start after it."""
    return {row["step"]: row["kl"] for row in run.steps if "kl" in row}


def between(run: Run, step: int) -> float:
    """A limit that is first exceeded after this step of a run."""
    found = kls(run)
    before, after = max(kl for at, kl in found.items() if at < step), found[step]
    assert before < after
    return (before + after) / 2


def state_of(run: Run, step: int) -> dict[str, Any]:
    return checkpoint.read_state(run.folder / "checkpoints" / f"step-{step:06d}")


def halted(run: Run, step: int, folder: Path) -> Path:
    """Its folder, copied, as if it had died after the checkpoint of this step."""
    shutil.copytree(run.folder, folder)
    (folder / "adapters.safetensors").touch()  # full fine-tuning writes another file
    rewind(folder, step)
    return folder


def checkpoint_of(run: Run, step: int) -> bytes:
    return (run.folder / "checkpoints" / f"step-{step:06d}" / "adapters.safetensors").read_bytes()


def weights(folder: Path) -> dict[str, mx.array]:
    """All tensors of a model folder, as mlx-lm reads them."""
    return dict(tree_flatten(mlx_lm_load(str(folder))[0].parameters()))  # type: ignore


# ------------------------------------------------------------------ what is measured, and when


def answers(folder: Path, rows: list[dict[str, str]], adapter: Path | None = None) -> np.ndarray:
    """float64 log-probs [n, V] at every token of every answer, by mlx-lm alone, one row at a time."""
    model, tokenizer = mlx_lm_load(str(folder), adapter_path=str(adapter) if adapter else None)[:2]
    found = []
    for row in rows:
        question = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
        answer = tokenizer.encode(row["completion"] + "<|im_end|>", add_special_tokens=False)
        logits = np.array(model(mx.array([[*prompt, *answer]]))[0].astype(mx.float32)).astype(np.float64)
        found.append(logits[len(prompt) - 1 : -1])
    logits = np.concatenate(found)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("held_out", [True, False])
def test_the_kl_of_a_row_is_what_mlx_lm_computes(tiny_model_dir, tmp_path, held_out):
    """Answers so short that a probe takes all their tokens; of held-out rows where there are any."""
    rows, others = ([{"prompt": f"Say {i}", "completion": f"{word} {i}"} for i in range(4)] for word in ("well", "no"))
    folder = write_rows(tmp_path / "data" / "train.jsonl", rows).parent
    if held_out:
        write_rows(folder / "valid.jsonl", others)
    run = launch(tmp_path / "out", tiny_model_dir, folder, "--steps", 12, method="sft")
    assert list(kls(run)) == [10, 12]
    measured = others if held_out else rows
    start, now = answers(tiny_model_dir, measured), answers(tiny_model_dir, measured, run.folder)
    assert kls(run)[12] == pytest.approx((np.exp(now) * (now - start)).sum(-1).mean(), rel=1e-4)


def test_measuring_changes_nothing_and_grows(tiny_model_dir, tmp_path, pairs):
    words = ("--steps", 15)
    often = launch(tmp_path / "a" / "out", tiny_model_dir, pairs, *words, "--kl-every", 1)
    never = launch(tmp_path / "b" / "out", tiny_model_dir, pairs, *words, "--kl-every", 0)
    seldom = launch(tmp_path / "c" / "out", tiny_model_dir, pairs, *words, "--kl-every", 7)
    assert (kls(never), list(kls(seldom))) == ({}, [7, 14, 15])
    assert often.adapter == never.adapter
    found = kls(often)
    assert {step: found[step] for step in (7, 14, 15)} == kls(seldom)
    assert 0 < found[1] < 0.05 * found[15] and found[5] < found[10] < found[15]


def test_the_progress_line_keeps_the_last_kl(tiny_model_dir, tmp_path, pairs, capsys):
    run = launch(tmp_path / "out", tiny_model_dir, pairs, "--steps", 5, "--kl-every", 4)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("step 5/5"))
    assert f"  KL {kls(run)[5]:.4g}  " in line
    launch(tmp_path / "dry", tiny_model_dir, pairs, "--dry-run", "--steps", 300)
    assert "at 64 tokens of 8 rows, every 15 steps" in capsys.readouterr().out


def test_with_full_fine_tuning_the_start_outlives_a_resume(tiny_model_dir, tmp_path, pairs):
    words = ("--full", "--learning-rate", 1e-4, "--save-every", 1, "--keep", 99, "--steps", 6, *FLAT)
    straight = launch(tmp_path / "a" / "out", tiny_model_dir, pairs, *words)
    again = launch(halted(straight, 3, tmp_path / "b" / "out"), tiny_model_dir, pairs, *words, "--resume")
    assert kls(again) == kls(straight) and len(kls(again)) == 6
    assert again.steps == straight.steps


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--kl-max", 0.1, "--kl-every", 0), "--kl-max has no effect with --kl-every 0"),
        (("--kl-max", 0), "--kl-max must be above 0, got 0.0"),
        (("--kl-max", "nan"), "--kl-max must be above 0, got nan"),
        (("--kl-every", -1), "--kl-every must be 0 or more, got -1"),
        (("--kl-action", "stop"), "--kl-action stop needs --kl-max"),
        (("--kl-max", 0.1, "--kl-action", "halt"), "--kl-action: expected one of lower, stop, rollback, got 'halt'"),
    ],
)
def test_flags_that_make_no_sense_are_refused(tiny_model_dir, tmp_path, pairs, words, said):
    with pytest.raises(UserError, match=said):
        launch(tmp_path / "out", tiny_model_dir, pairs, *words)


# ------------------------------------------------------------------ lower


def test_lower_halves_the_rate_after_each_measurement_above(free, tiny_model_dir, tmp_path, pairs, capsys):
    most = between(free, 6)
    run = launch(tmp_path / "out", tiny_model_dir, pairs, "--steps", 12, *FLAT, "--kl-max", most)
    assert run.steps[:6] == free.steps[:6]
    halvings = 0
    for row in run.steps:
        assert row["learning_rate"] == 1e-3 * 0.5**halvings
        halvings += row["kl"] > most
    assert run.steps[6]["learning_rate"] == 5e-4 and halvings >= 2
    assert kls(run)[12] < kls(free)[12]
    out = capsys.readouterr().out
    assert out.count("the learning rate is halved from here on") + out.count("no step is left") == halvings
    assert f"step 6: the KL to the start is {kls(run)[6]:.3g} nats per token, above --kl-max {most:g}" in out


def test_going_on_with_a_lowered_rate_equals_never_stopping(free, tiny_model_dir, tmp_path, split, capsys):
    most = kls(free)[4] * 0.8  # of other rows, so merely near the fourth step here
    words = ("--steps", 10, *FLAT, "--kl-max", most, "--save-every", 1, "--keep", 99, "--eval-every", 3)
    straight = launch(tmp_path / "a" / "out", tiny_model_dir, split, *words)
    lowered = state_of(straight, 7)["drift"]["halvings"]
    assert lowered > 0 and straight.steps[7]["learning_rate"] == 1e-3 * 0.5**lowered
    folder = halted(straight, 7, tmp_path / "b" / "out")
    again = launch(folder, tiny_model_dir, split, *words, "--resume")
    assert again.steps == straight.steps and again.evaluations == straight.evaluations
    assert again.adapter == straight.adapter
    with pytest.raises(UserError, match="--kl-max was .* and is now 9"):
        launch(folder, tiny_model_dir, split, *words, "--kl-max", 9, "--resume")


# ------------------------------------------------------------------ stop


def test_stop_ends_with_checkpoint_evaluation_and_result(tiny_model_dir, tmp_path, split, capsys):
    free = launch(tmp_path / "free", tiny_model_dir, split, "--steps", 12, *FLAT)
    words = ("--steps", 12, *FLAT, "--kl-max", between(free, 5), "--kl-action", "stop")
    run = launch(tmp_path / "out", tiny_model_dir, split, *words)
    out = capsys.readouterr().out
    assert run.code == 0 and run.steps == free.steps[:5]
    assert 5 in run.checkpoints and run.adapter == checkpoint_of(run, 5)
    assert [row["step"] for row in run.evaluations] == [4, 5]  # that of the first epoch, and the last word
    assert "step 5: the KL to the start is" in out and "the run stops here" in out and "done: 5 steps" in out
    rows, before = run.rows, run.adapter
    again = launch(run.folder, tiny_model_dir, split, *words, "--resume")
    assert (again.rows, again.adapter, again.code) == (rows, before, 0)


# ------------------------------------------------------------------ rollback


def test_rollback_leaves_the_newest_state_within_the_limit(free, tiny_model_dir, tmp_path, pairs, capsys):
    shared = ("--lr-schedule", "constant", "--steps", 12, "--kl-max", between(free, 6), "--kl-action", "rollback")
    words = (*shared, "--kl-every", 2, "--keep", 1, "--save-every", 100)
    run = launch(tmp_path / "out", tiny_model_dir, pairs, *words)
    assert run.code == 0 and [row["step"] for row in run.steps] == [1, 2, 3, 4, 5, 6]
    assert run.adapter == checkpoint_of(free, 4) == checkpoint_of(run, 4)
    assert run.checkpoints == [4, 6]
    out = capsys.readouterr().out
    assert out.count("above --kl-max") == 1 and "the run stops and its result is the policy after step 4\n" in out
    rows = run.rows
    again = launch(run.folder, tiny_model_dir, pairs, *words, "--resume")
    assert again.rows == rows and again.adapter == checkpoint_of(free, 4)


def test_rollback_prefers_the_best_evaluation(tiny_model_dir, tmp_path, split, capsys):
    """Flipped held-out pairs: they get worse with every step, so the first evaluation is the best."""
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pair_rows(11)[8:]]
    write_rows(split / "valid.jsonl", flipped)
    words = ("--steps", 12, "--lr-schedule", "constant", "--kl-every", 2, "--eval-every", 3, "--keep", 1)
    free = launch(tmp_path / "free", tiny_model_dir, split, *words, "--kl-every", 1)
    losses = {row["step"]: row["eval_loss"] for row in free.evaluations}
    assert losses[3] < losses[6] < losses[9]
    acting = ("--kl-max", between(free, 10), "--kl-action", "rollback")
    run = launch(tmp_path / "out", tiny_model_dir, split, *words, *acting)
    assert list(kls(run)) == [2, 3, 4, 6, 8, 9, 10]  # also where it evaluates
    assert [row["step"] for row in run.evaluations] == [3, 6, 9]
    assert run.adapter == checkpoint_of(run, 3)
    assert f"after step 3, the best evaluation within it (loss {losses[3]:.4f})" in capsys.readouterr().out


def test_rollback_after_an_interruption(free, tiny_model_dir, tmp_path, pairs):
    acting = ("--steps", 9, *FLAT, "--kl-max", between(free, 7), "--kl-action", "rollback", "--save-every", 1)
    straight = launch(tmp_path / "a" / "out", tiny_model_dir, pairs, *acting, "--keep", 99)
    assert straight.adapter == checkpoint_of(straight, 6)
    for step in (0, 6):
        folder = halted(straight, step, tmp_path / f"b{step}" / "out")
        again = launch(folder, tiny_model_dir, pairs, *acting, "--keep", 99, "--resume")
        assert again.steps == straight.steps and again.adapter == straight.adapter


@pytest.mark.parametrize("words", [(), ("--full", "--learning-rate", 1e-4)], ids=["lora", "full"])
def test_rollback_to_the_very_start(tiny_model_dir, tmp_path, pairs, words, capsys):
    """A limit that the first measurement is above: the result is the policy as it began."""
    acting = ("--steps", 4, *FLAT, *words, "--kl-max", 1e-12, "--kl-action", "rollback")
    run = launch(tmp_path / "out", tiny_model_dir, pairs, *acting)
    assert run.code == 0 and len(run.steps) == 1 and run.checkpoints == [0, 1]
    assert "the policy after step 0, where it began: lower --learning-rate" in capsys.readouterr().out
    if words:
        before, after = (weights(folder) for folder in (tiny_model_dir, run.folder / "model"))
        assert largest_difference(before, after) == 0
    else:
        assert not any(mx.any(value).item() for name, value in tensors(run.folder).items() if name.endswith("lora_b"))


def test_rollback_that_is_never_needed_writes_the_last_state(tiny_model_dir, tmp_path, split):
    words = ("--steps", 6, "--eval-every", 2, "--kl-every", 2, "--keep", 1)
    free = launch(tmp_path / "free", tiny_model_dir, split, *words)
    run = launch(tmp_path / "out", tiny_model_dir, split, *words, "--kl-max", 1e9, "--kl-action", "rollback")
    assert run.adapter == free.adapter and run.steps == free.steps


def test_early_stopping_and_rollback_go_together(tiny_model_dir, tmp_path, split):
    """Early stopping comes first: nothing was above, so its best evaluation is the result."""
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pair_rows(11)[8:]]
    write_rows(split / "valid.jsonl", flipped)
    words = ("--steps", 20, "--eval-every", 1, "--early-stop", 3, "--learning-rate", 3e-3, "--keep", 1)
    alone = launch(tmp_path / "alone", tiny_model_dir, split, *words)
    run = launch(tmp_path / "out", tiny_model_dir, split, *words, "--kl-max", 1e9, "--kl-action", "rollback")
    assert run.adapter == alone.adapter and len(run.steps) == len(alone.steps) < 20


# ------------------------------------------------------------------ displacement


def test_displacement_is_told_once_with_its_remedies(tiny_model_dir, tmp_path, capsys):
    """Completions that are known by heart and nearly equal: what lowers one lowers the other."""
    rows = [
        {"prompt": f"Say {i}", "chosen": f"{i} is well known.", "rejected": f"{i} is well known!"} for i in range(8)
    ]
    both = [{"prompt": row["prompt"], "completion": row[side]} for row in rows for side in ("chosen", "rejected")]
    known, near = write_rows(tmp_path / "known.jsonl", both), write_rows(tmp_path / "near.jsonl", rows)
    words = ("--steps", 60, "--learning-rate", 1e-2, "--batch-size", 8)
    learned = launch(tmp_path / "sft", tiny_model_dir, known, *words, method="sft")
    assert "likelihood displacement" not in capsys.readouterr().out
    words = ("--adapter", learned.folder, "--steps", 40, "--batch-size", 4, "--save-every", 10, "--keep", 99)
    run = launch(tmp_path / "out", tiny_model_dir, near, *words)
    lines = [line for line in capsys.readouterr().out.splitlines() if "likelihood displacement" in line]
    assert len(lines) == 1 and "--loss-type sigmoid,sft --loss-weights 1,0.2" in lines[0]
    step = int(lines[0].split(":")[0].removeprefix("step "))
    for side in ("chosen", "rejected"):
        window = [row[f"rewards/{side}"] for row in run.steps[step - 20 : step]]
        assert np.mean(window) < -4 * np.std(window, ddof=1) / np.sqrt(20)
        assert f"rewards/{side} by {-np.mean(window):.3g}" in lines[0]
    rewind(run.folder, 10)
    launch(run.folder, tiny_model_dir, near, *words, "--resume")
    assert [line for line in capsys.readouterr().out.splitlines() if "likelihood displacement" in line] == lines
