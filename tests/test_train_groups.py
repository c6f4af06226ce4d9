# SPDX-License-Identifier: Apache-2.0
"""grpo and rlvr as a user runs them: online and given groups, their metrics, resume, and what is refused."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from train_tools import largest_difference, launch, start_process, tensors, write_rows

from mlx_realign import data
from mlx_realign.advantages import group_advantages
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy

JUDGE = """
def share(completion, row, argument=""):
    letters = [c for c in completion if c.isalpha()]
    return sum(c in "aeiou" for c in letters) / len(letters) if letters else 0.0

def none(completion, row, argument=""):
    return 0.5
"""
ONLINE = ("--group-size", 4, "--max-new-tokens", 6, "--batch-size", 2, "--steps", 4, "--learning-rate", "5e-3")
GIVEN = [
    {"prompt": f"Say {i}.", "responses": [{"text": f"{i} it is", "score": 1.0}, {"text": "no", "score": i % 2 / 2}]}
    for i in range(8)
]


@pytest.fixture
def judge(tmp_path: Path) -> str:
    (tmp_path / "judge.py").write_text(JUDGE)
    return f"{tmp_path / 'judge.py'}:share"


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "asked.jsonl", [{"prompt": f"Question {i}?"} for i in range(6)])


def rows_of(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_clocks(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("step_s", "tokens_per_second", "peak_memory_gb", "rollout_s", "rollout_tokens_per_second")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def test_an_online_run_has_its_metrics_samples_and_adapter(tmp_path, tiny_model_dir, asked, judge):
    run = launch(tmp_path / "out", tiny_model_dir, asked, *ONLINE, "--verifier", judge, method="grpo")
    assert run.code == 0
    rows = rows_of(tmp_path / "out")
    wanted = {"reward", "reward_std", "frac_reward_zero_std", "rewards/share/mean", "rewards/share/std", "entropy"}
    wanted |= {"completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean", "rollout_s"}
    for row in rows:
        assert wanted <= set(row)
        assert 0 <= row["reward"] <= 1
        assert row["sampling/sampling_logp_difference/mean"] < 1e-4
        assert row["clip_ratio/region_mean"] == 0  # on-policy: every ratio is 1
    samples = rows_of(tmp_path / "out", "samples.jsonl")
    assert {s["step"] for s in samples} == {1, 2, 3, 4}
    for sample in samples:
        letters = [c for c in sample["completion"] if c.isalpha()]
        expected = sum(c in "aeiou" for c in letters) / len(letters) if letters else 0
        assert sample["reward"] == pytest.approx(expected)
    first = [s["reward"] for s in samples if s["step"] == 1]
    assert np.mean(first) == pytest.approx(rows[0]["reward"], abs=1e-9)  # 2 prompts x 4: all of them are kept


def test_the_reward_rises(tmp_path, tiny_model_dir, asked, judge):
    more = [*ONLINE[:-4], "--steps", 40, "--learning-rate", "2e-2", "--batch-size", 6]
    run = launch(tmp_path / "out", tiny_model_dir, asked, *more, "--verifier", judge, method="grpo")
    assert run.code == 0
    rewards = [row["reward"] for row in rows_of(tmp_path / "out")]
    assert np.mean(rewards[-8:]) > np.mean(rewards[:8]) + 0.1


@pytest.mark.parametrize("extra", [(), ("--updates-per-rollout", 2), ("--dynamic-sampling", 2)], ids=["1", "2", "dyn"])
def test_a_run_that_is_resumed_equals_one_that_never_stopped(tmp_path, tiny_model_dir, asked, judge, extra):
    words = [*ONLINE, "--save-every", 1, "--keep", 9, "--verifier", judge, *extra]
    words[words.index("--steps") + 1] = 5
    assert launch(tmp_path / "a", tiny_model_dir, asked, *words, method="grpo").code == 0
    assert launch(tmp_path / "b", tiny_model_dir, asked, *words, method="grpo").code == 0
    for step in (4, 5):  # as if it had been killed after step 3, which with two updates is within a rollout
        folder = tmp_path / "b" / "checkpoints" / f"step-{step:06d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    again = launch(tmp_path / "b", tiny_model_dir, asked, *words, "--resume", method="grpo")
    assert again.code == 0
    assert without_clocks(rows_of(tmp_path / "a")) == without_clocks(rows_of(tmp_path / "b"))
    assert rows_of(tmp_path / "a", "samples.jsonl") == rows_of(tmp_path / "b", "samples.jsonl")
    assert largest_difference(tensors(tmp_path / "a"), tensors(tmp_path / "b")) == 0


def test_killed_within_a_rollout_it_goes_on_with_the_same_numbers(tmp_path, tiny_model_dir, asked, judge):
    words = [*ONLINE, "--save-every", 1, "--verifier", judge]
    words[words.index("--steps") + 1] = 12
    assert launch(tmp_path / "a", tiny_model_dir, asked, *words, method="grpo").code == 0
    process = start_process(tmp_path / "b", tiny_model_dir, asked, *words, method="grpo")
    metrics = tmp_path / "b" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    again = launch(tmp_path / "b", tiny_model_dir, asked, *words, "--resume", method="grpo")
    assert again.code == 0
    assert without_clocks(rows_of(tmp_path / "a")) == without_clocks(rows_of(tmp_path / "b"))
    assert largest_difference(tensors(tmp_path / "a"), tensors(tmp_path / "b")) == 0


def test_equal_rewards_move_nothing(tmp_path, tiny_model_dir, asked, judge):
    words = [*ONLINE, "--verifier", judge.replace("share", "none")]
    run = launch(tmp_path / "out", tiny_model_dir, asked, *words, method="grpo")
    assert run.code == 0
    for row in rows_of(tmp_path / "out"):
        assert row["grad_norm"] == 0
        assert row["frac_reward_zero_std"] == 1
    assert all(not np.array(v).any() for k, v in tensors(tmp_path / "out").items() if k.endswith("lora_b"))


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "gspo", "luspo", "vespo", "gmpo"])
def test_every_loss_trains_online(tmp_path, tiny_model_dir, asked, judge, loss):
    words = [*ONLINE, "--verifier", judge, "--loss-type", loss, "--updates-per-rollout", 2, "--kl-coef", 0.05]
    run = launch(tmp_path / "out", tiny_model_dir, asked, *words, method="grpo")
    assert run.code == 0
    rows = rows_of(tmp_path / "out")
    assert rows[0]["kl_reference"] == pytest.approx(0, abs=1e-6)
    assert rows[1]["kl_reference"] > 0
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert "reward" not in rows[1]  # the second update of the same rollout


@pytest.mark.parametrize("loss", ["dapo", "raft", "awr", "topr"])
@pytest.mark.parametrize("behaviour", ["epoch", "start", "step"])
def test_given_groups_train_and_prefer_the_better(tmp_path, tiny_model_dir, loss, behaviour):
    given = write_rows(tmp_path / "given.jsonl", GIVEN)
    words = ["--loss-type", loss, "--behaviour", behaviour, "--epochs", 3, "--batch-size", 4, "--learning-rate", "5e-3"]
    run = launch(tmp_path / "out", tiny_model_dir, given, *words, method="grpo")
    assert run.code == 0
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 6
    assert rows[0]["reward"] > 0.5
    policies = Policy.load(str(tiny_model_dir)), Policy.load(str(tiny_model_dir), adapter=str(tmp_path / "out"))
    gaps = [gap(policy) for policy in policies]
    assert gaps[1] > gaps[0]


def gap(policy: Policy) -> float:
    """Mean over rows of log-prob of the better response minus that of the worse."""
    found = []
    for row in GIVEN:
        start, logps = len(data.encode_prompt(row["prompt"], policy.tokenizer)), []
        for response in row["responses"]:
            talk = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": response["text"]}]
            text = policy.tokenizer.apply_chat_template(talk, tokenize=False)
            ids = policy.tokenizer.encode(text, add_special_tokens=False)
            logits = policy.model(mx.array([ids]))[0].astype(mx.float32)
            every = logits - mx.logsumexp(logits, -1, keepdims=True)
            taken = [every[i - 1, ids[i]].item() for i in range(start, len(ids))]
            logps.append(sum(map(float, taken)))  # type: ignore[arg-type]
        found.append(logps[0] - logps[1])
    return float(np.mean(found))


def test_a_resumed_run_over_given_groups_remembers_whose_ratio_it_is(tmp_path, tiny_model_dir):
    given = write_rows(tmp_path / "given.jsonl", GIVEN)
    words = ["--epochs", 3, "--batch-size", 2, "--learning-rate", "5e-3", "--save-every", 1, "--keep", 99]
    for name in ("a", "b"):
        assert launch(tmp_path / name, tiny_model_dir, given, *words, method="grpo").code == 0
    for step in range(7, 13):
        folder = tmp_path / "b" / "checkpoints" / f"step-{step:06d}"
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    again = launch(tmp_path / "b", tiny_model_dir, given, *words, "--resume", method="grpo")
    assert again.code == 0
    a, b = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert without_clocks(a) == without_clocks(b)
    assert a[5]["ratio"] != pytest.approx(1, abs=1e-4)  # within the second epoch
    assert a[4]["ratio"] == pytest.approx(1, abs=1e-4)  # at its start


def test_mixed_rows_and_held_out_problems(tmp_path, tiny_model_dir, judge):
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [*GIVEN[:3], {"prompt": "Question?"}, {"prompt": "Another?"}])
    write_rows(folder / "valid.jsonl", [{"prompt": "Held out?"}])
    words = [*ONLINE, "--verifier", judge, "--eval-every", 2]
    run = launch(tmp_path / "out", tiny_model_dir, folder, *words, method="grpo")
    assert run.code == 0
    found = [row for row in rows_of(tmp_path / "out") if "eval_reward" in row]
    assert len(found) == 2
    assert all(row["eval_loss"] == -row["eval_reward"] for row in found)


def test_rlvr_learns_from_marked_responses(tmp_path, tiny_model_dir):
    marked = [
        {
            "problem": f"{i} + 1?",
            "solution": str(i + 1),
            "responses": [{"text": str(i + 1), "correct": True}, {"text": "0", "correct": False}],
        }
        for i in range(4)
    ]
    given = write_rows(tmp_path / "marked.jsonl", marked)
    words = ["--epochs", 2, "--batch-size", 2, "--learning-rate", "1e-3"]
    run = launch(tmp_path / "out", tiny_model_dir, given, *words, method="rlvr")
    assert run.code == 0
    rows = rows_of(tmp_path / "out")
    assert rows[0]["reward"] == 0.5
    assert rows[-1]["logps/positive"] > rows[0]["logps/positive"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--verifier is needed"),
        (("--verifier", "nobody"), "there is no verifier 'nobody'"),
        (("--verifier", "exact"), "rows cannot be judged"),
        (("--verifier", "exact", "--group-size", 1), "--group-size must be at least 2"),
        (("--verifier", "exact", "--loss-type", "ppo"), "--loss-type ppo: expected one of"),
        (("--verifier", "exact", "--loss-type", "cispo", "--clip-low", 0.1), "--clip-low has no part in"),
        (("--verifier", "exact", "--awr-lambda", 0.1), "--awr-lambda is for --loss-type awr"),
        (("--verifier", "exact", "--raft-threshold", 0.5), "--raft-threshold is for --loss-type raft"),
        (("--verifier", "exact", "--advantage", "rloo", "--scale-rewards", "none"), "--scale-rewards is for"),
        (("--verifier", "exact", "--delta", 1.2), "--delta must be above 1 + clip_high"),  # dapo's own is 0.28
        (("--verifier", "exact", "--no-kl-correction"), "--no-kl-correction is for --kl-coef above 0"),
        (("--verifier", "exact", "--reference", "base"), "--reference is for --kl-coef above 0"),
        (("--verifier", "exact", "--negative-weight", 0.5), "--negative-weight is for given responses"),
        (("--verifier", "exact", "--behaviour", "step"), "--behaviour is for given responses"),
        (("--verifier", "exact", "--off-policy-threshold", 1), "--off-policy-threshold is for --updates-per-rollout"),
        (("--verifier", "exact", "--full", "--kl-coef", 0.1), "no second copy of"),
        (("--verifier", "exact", "--reward-weights", "1,2"), "2 weights for 1 verifiers"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(tmp_path, tiny_model_dir, asked, words, said):
    with pytest.raises(UserError) as told:
        launch(tmp_path / "out", tiny_model_dir, asked, "--steps", 1, *words, method="grpo")
    assert said in str(told.value)


def test_advantages_in_the_batch_are_those_of_the_rewards(tmp_path, tiny_model_dir, asked, judge):
    run = launch(tmp_path / "out", tiny_model_dir, asked, *ONLINE, "--verifier", judge, method="grpo")
    assert run.code == 0
    samples = [s for s in rows_of(tmp_path / "out", "samples.jsonl") if s["step"] == 1]
    rewards = np.array([s["reward"] for s in samples])
    std = [rewards[i : i + 4].std(ddof=1) for i in (0, 4)]
    assert rows_of(tmp_path / "out")[0]["reward_std"] == pytest.approx(np.mean(std))
    assert group_advantages(rewards, np.repeat([0, 1], 4)).sum() == pytest.approx(0, abs=1e-5)
