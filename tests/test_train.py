# SPDX-License-Identifier: Apache-2.0
"""The loop: what a step computes, when it evaluates and saves, what it says, and what a library call does."""

import json
import math
from importlib import metadata
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load as mlx_lm_load
from train_tools import Run, cache, largest_difference, launch, pair_rows, sft_rows, tensors, write_rows

import mlx_realign as mr
from mlx_realign import UserError, adapter, fingerprint
from mlx_realign.policy import Policy

LN2 = math.log(2)


@pytest.fixture
def pairs(tmp_path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", pair_rows(8))


@pytest.fixture
def talks(tmp_path) -> Path:
    return write_rows(tmp_path / "sft.jsonl", sft_rows(8))


@pytest.fixture
def split(tmp_path) -> Path:
    """A folder with held-out rows."""
    write_rows(tmp_path / "split" / "train.jsonl", pair_rows(8))
    write_rows(tmp_path / "split" / "valid.jsonl", pair_rows(11)[8:])
    return tmp_path / "split"


# ------------------------------------------------------------------ what a step computes


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_four_micro_batches_of_one_row_are_one_of_four(tiny_model_dir, tmp_path, method):
    """Rows of unequal length, in the order of the file: loss, gradient norm, metrics and weights of 4 steps."""
    data = write_rows(tmp_path / "rows.jsonl", sft_rows(8) if method == "sft" else pair_rows(8))
    shared = ("--no-shuffle", "--epochs", 2, "--max-grad-norm", 0.5)
    wide = launch(tmp_path / "wide" / "out", tiny_model_dir, data, "--batch-size", 4, *shared, method=method)
    long = ("--batch-size", 1, "--gradient-accumulation", 4)
    narrow = launch(tmp_path / "narrow" / "out", tiny_model_dir, data, *long, *shared, method=method)
    assert wide.code == narrow.code == 0
    assert len(wide.steps) == len(narrow.steps) == 4
    for one, other in zip(wide.steps, narrow.steps, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert largest_difference(tensors(wide.folder), tensors(narrow.folder)) < 2e-3  # Adam divides by tiny numbers


def test_the_loss_of_a_window_is_the_mean_over_its_tokens(tiny_model_dir, tmp_path, talks):
    """Against log-softmax of the logits of the bare model in mlx-lm, float64, token by token."""
    run = launch(
        tmp_path / "out",
        tiny_model_dir,
        talks,
        "--no-shuffle",
        "--gradient-accumulation",
        3,
        "--steps",
        1,
        method="sft",
    )
    model, tokenizer = mlx_lm_load(str(tiny_model_dir))[:2]
    nats, count, tokens = 0.0, 0, 0
    for row in sft_rows(6):
        question = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True)
        answer = tokenizer.encode(row["completion"] + "<|im_end|>", add_special_tokens=False)
        logits = np.array(model(mx.array([[*prompt, *answer]]))[0].astype(mx.float32)).astype(np.float64)
        tokens += len(prompt) + len(answer)
        for place, token in enumerate(answer, len(prompt) - 1):
            nats -= logits[place, token] - np.log(np.exp(logits[place]).sum())
            count += 1
    assert run.steps[0]["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert run.steps[0]["num_tokens"] == tokens


def test_dpo_starts_at_ln_2_and_learns(tiny_model_dir, tmp_path, pairs):
    run = launch(tmp_path / "out", tiny_model_dir, pairs, "--epochs", 4)
    assert abs(run.steps[0]["loss"] - LN2) <= 1e-6
    assert run.steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert run.steps[-1]["loss"] < 0.5 * LN2
    assert run.steps[-1]["rewards/accuracies"] == 1.0


def test_the_learning_rate_of_a_row_is_the_one_its_step_used(tiny_model_dir, tmp_path, pairs):
    words = ("--optimizer", "sgd", "--max-grad-norm", 0, "--lr-schedule", "linear", "--warmup-steps", 1, "--steps", 3)
    run = launch(tmp_path / "out", tiny_model_dir, pairs, *words, "--keep", 3, "--save-every", 1)
    assert [row["learning_rate"] for row in run.steps] == pytest.approx([1e-3, 1e-3, 5e-4])
    states = [tensors(run.folder / "checkpoints" / f"step-{step:06d}") for step in (1, 2, 3)]
    moves = [
        float(np.sqrt(sum(np.square(np.array(b[k] - a[k])).sum() for k in a)))
        for a, b in zip(states, states[1:], strict=False)
    ]
    for move, row in zip(moves, run.steps[1:], strict=True):  # plain gradient descent moves by rate x norm
        assert move == pytest.approx(row["learning_rate"] * row["grad_norm"], rel=1e-3)


def test_steps_and_epochs_say_how_long(tiny_model_dir, tmp_path, pairs):
    """8 rows in batches of 3, two batches to a step: 3 batches an epoch."""
    size = ("--batch-size", 3, "--gradient-accumulation", 2)
    run = launch(tmp_path / "a", tiny_model_dir, pairs, *size, "--epochs", 1.5)  # 4 or 5 batches
    assert [round(row["epoch"], 3) for row in run.steps] == [0.667, 1.333]
    run = launch(tmp_path / "b", tiny_model_dir, pairs, *size, "--epochs", 1)
    assert [round(row["epoch"], 3) for row in run.steps] == [0.667, 1.0]  # the last step has one batch
    run = launch(tmp_path / "c", tiny_model_dir, pairs, *size, "--steps", 4)
    assert [round(row["epoch"], 3) for row in run.steps] == [0.667, 1.333, 2.0, 2.667]


# ------------------------------------------------------------------ evaluation, best, early stop, checkpoints


def test_evaluation_is_dpo_on_the_held_out_rows_and_leaves_training_alone(tiny_model_dir, tmp_path, split):
    with_eval = launch(tmp_path / "with", tiny_model_dir, split, "--steps", 4, "--eval-every", 2)
    without = launch(tmp_path / "without", tiny_model_dir, split / "train.jsonl", "--steps", 4)
    assert [row["step"] for row in with_eval.evaluations] == [2, 4]
    assert {"eval_loss", "eval_rewards/margins", "eval_rewards/accuracies"} <= with_eval.evaluations[0].keys()
    assert with_eval.adapter == without.adapter
    assert without.evaluations == []
    named = ("--eval-data", split / "valid.jsonl", "--steps", 4, "--eval-every", 2)
    again = launch(tmp_path / "named", tiny_model_dir, split / "train.jsonl", *named)
    assert again.evaluations == with_eval.evaluations


def test_the_best_checkpoint_is_kept_and_early_stopping_writes_it(tiny_model_dir, tmp_path, split):
    """Training on flipped pairs makes the held-out loss worse from the second evaluation on."""
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pair_rows(11)[8:]]
    write_rows(split / "valid.jsonl", flipped)
    words = ("--eval-every", 1, "--save-every", 1, "--keep", 1, "--steps", 20, "--learning-rate", 3e-3)
    run = launch(tmp_path / "out", tiny_model_dir, split, *words, "--early-stop", 3)
    losses = [row["eval_loss"] for row in run.evaluations]
    best = losses.index(min(losses)) + 1
    assert len(run.steps) == len(losses) == best + 3 < 20
    assert run.checkpoints == [best, best + 3]
    assert run.adapter == (run.folder / "checkpoints" / f"step-{best:06d}" / "adapters.safetensors").read_bytes()


def test_without_early_stop_the_last_state_is_written(tiny_model_dir, tmp_path, split, capsys):
    flipped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pair_rows(11)[8:]]
    write_rows(split / "valid.jsonl", flipped)
    run = launch(tmp_path / "out", tiny_model_dir, split, "--eval-every", 1, "--steps", 5, "--keep", 1)
    assert run.adapter == (run.folder / "checkpoints" / "step-000005" / "adapters.safetensors").read_bytes()
    assert "best evaluation: loss" in capsys.readouterr().out


def test_save_every_and_keep(tiny_model_dir, tmp_path, pairs):
    run = launch(tmp_path / "out", tiny_model_dir, pairs, "--steps", 7, "--save-every", 3, "--keep", 2)
    assert run.checkpoints == [6, 7]  # 3 went when 7, the end, came
    run = launch(tmp_path / "many", tiny_model_dir, pairs, "--steps", 7, "--save-every", 3, "--keep", 9)
    assert run.checkpoints == [3, 6, 7]


@pytest.mark.parametrize("words", [("--early-stop", 2), ("--eval-every", 2)])
def test_evaluating_without_held_out_rows_is_refused(tiny_model_dir, tmp_path, pairs, words):
    with pytest.raises(UserError, match=f"{words[0]} needs held-out rows: give --eval-data"):
        launch(tmp_path / "out", tiny_model_dir, pairs, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--lora-dropout", 0.1), "--lora-dropout is for sft"),
        (("--optimizer", "adam", "--weight-decay", 0.1), "--weight-decay has no effect on --optimizer adam"),
        (("--full", "--adapter", "x"), "--full trains the model's own weights: fuse --adapter into it first"),
        (("--full", "--method", "sft", "--lora-dropout", 0.1), "--lora-dropout is of an adapter"),
        (("--report-to", "trackio"), "--report-to trackio: not installed; pip install trackio"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(tiny_model_dir, tmp_path, pairs, words, said):
    with pytest.raises(UserError, match=said):
        launch(tmp_path / "out", tiny_model_dir, pairs, *words)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------ what it says


def test_dry_run_says_what_would_be_done_and_writes_nothing(tiny_model_dir, tmp_path, pairs, capsys):
    run = launch(tmp_path / "out", tiny_model_dir, pairs, "--dry-run", "--json", "--epochs", 3)
    assert run.code == 0 and not run.folder.exists()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    facts = lines[-1]
    widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]  # q k v o gate up down
    assert facts["trained_parameters"] == 2 * 4 * sum(a + b for a, b in widths)  # 2 layers, rank 4
    assert (facts["rows"], facts["steps"], facts["micro_batches_per_epoch"], facts["learning_rate"]) == (8, 12, 4, 1e-3)
    assert facts["self_check"]["shared_prompts"].startswith("exact")
    assert 0 < facts["estimated_peak_memory_gb"] < 1 and 0 < facts["estimated_time_s"] < 600
    real = launch(tmp_path / "real", tiny_model_dir, pairs, "--epochs", 3)
    tokens = real.steps[3]["num_tokens"]
    assert facts["tokens"] == tokens  # one epoch's
    peak = max(row["peak_memory_gb"] for row in real.rows)
    assert 0.5 * peak <= facts["estimated_peak_memory_gb"] <= 2 * peak


def test_dry_run_is_a_table_for_people(tiny_model_dir, tmp_path, pairs, capsys):
    launch(tmp_path / "out", tiny_model_dir, pairs, "--dry-run")
    out = capsys.readouterr().out
    for said in ("trained parameters", "8,192", "rows", "steps", "self check", "estimated peak memory gb"):
        assert said in out


def test_json_is_all_that_standard_output_gets(tiny_model_dir, tmp_path, split, capsys):
    run = launch(tmp_path / "out", tiny_model_dir, split, "--steps", 3, "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row for row in rows if "step" in row] == run.rows
    assert all(row.keys() == {"message"} for row in rows if "step" not in row)


def test_plain_lines_have_no_control_characters(tiny_model_dir, tmp_path, split, capsys):
    run = launch(tmp_path / "out", tiny_model_dir, split, "--steps", 3)
    out, err = capsys.readouterr()
    assert err == "" and "\x1b" not in out and "\r" not in out
    lines = out.splitlines()
    assert lines[0] == "step 1 is proven to learn: 14 of 28 trained tensors moved, the base is unchanged"
    assert lines[1].startswith(f"step 1/3  loss {run.steps[0]['loss']:.4g}  accuracy ")
    assert " tokens/s  ETA 0:" in lines[1] and lines[1].endswith(" GB")
    assert lines[-1].startswith("done: 3 steps, ") and lines[-1].endswith(f"written to {run.folder}")


def test_config_json_has_all_that_made_the_run(tiny_model_dir, tmp_path, pairs):
    run = launch(tmp_path / "out", tiny_model_dir, pairs, "--steps", 1, "--beta", 0.2)
    content = json.loads((run.folder / "config.json").read_text())
    assert (content["method"], content["method_settings"]["beta"]) == ("dpo", 0.2)
    assert content["settings"]["lora_rank"] == 4 and content["versions"]["mlx"] == metadata.version("mlx")
    assert content["run"]["model"] == fingerprint.base(Policy.load(str(tiny_model_dir)).model)
    assert content["facts"]["self_check"]["chunked_head"].startswith("exact")


def test_another_run_is_not_written_over(tiny_model_dir, tmp_path, pairs):
    first = launch(tmp_path / "out", tiny_model_dir, pairs, "--steps", 1)
    before = first.adapter
    with pytest.raises(UserError, match="holds a run already; --resume goes on with it, or name another folder"):
        launch(tmp_path / "out", tiny_model_dir, pairs, "--steps", 1)
    (tmp_path / "out" / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="holds a run already"):
        launch(tmp_path / "out", tiny_model_dir, pairs, "--steps", 1)
    assert first.adapter == before


# ------------------------------------------------------------------ as a library


def test_two_stages_on_one_policy(tiny_model_dir, tmp_path):
    """SFT, then DPO whose reference is the policy as SFT left it, without a second copy of the weights."""
    with cache(tmp_path / "cache"):
        policy = Policy.load(str(tiny_model_dir))
        base = fingerprint.base(policy.model)
        options = {"learning_rate": 1e-3, "batch_size": 2}
        last = mr.train(
            policy, method="sft", data=sft_rows(8), output=str(tmp_path / "sft"), lora_rank=4, epochs=2, **options
        )
        assert last["step"] == 8 and last["loss"] < Run(0, tmp_path / "sft").steps[0]["loss"]
        between = {name: mx.array(value) for name, value in adapter.state(policy.model).items()}
        assert largest_difference(tensors(tmp_path / "sft"), between) == 0
        mr.train(policy, method="dpo", data=pair_rows(8), output=str(tmp_path / "dpo"), **options)
    run = Run(0, tmp_path / "dpo")
    assert abs(run.steps[0]["loss"] - LN2) <= 1e-6
    for name, value in adapter.state(Policy.load(str(tiny_model_dir), adapter=str(tmp_path / "sft")).model).items():
        assert mx.array_equal(between[name], value), name
    assert fingerprint.base(policy.model) == base
    assert largest_difference(tensors(run.folder), adapter.state(policy.model)) == 0
    assert largest_difference(between, adapter.state(policy.model)) > 1e-3


def test_a_library_call_loads_the_model_itself_and_refuses_what_a_carried_adapter_settles(tiny_model_dir, tmp_path):
    with cache(tmp_path / "cache"):
        last = mr.train(
            model=str(tiny_model_dir), method="dpo", data=pair_rows(4), output=str(tmp_path / "a"), steps=1, dora=True
        )
        assert last["step"] == 1
        policy = Policy.load(str(tiny_model_dir), adapter=str(tmp_path / "a"))
        with pytest.raises(UserError, match="lora_rank: the policy carries an adapter already"):
            mr.train(policy, method="dpo", data=pair_rows(4), output=str(tmp_path / "b"), lora_rank=8)
        with pytest.raises(UserError, match="--full: the policy carries an adapter; fuse it first"):
            mr.train(policy, method="dpo", data=pair_rows(4), output=str(tmp_path / "b"), full=True)
        with pytest.raises(UserError, match="betta.*beta"):
            mr.train(policy, method="dpo", data=pair_rows(4), output=str(tmp_path / "b"), betta=0.3)
