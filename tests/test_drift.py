# SPDX-License-Identifier: Apache-2.0
"""KL to the start against NumPy over whole logits, the rules of --kl-max by hand, displacement on made-up series."""

import json
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_model_folder
from mlx.utils import tree_flatten, tree_unflatten
from policy_tools import SHAPES, make_examples

from mlx_realign.batch import Completion, Example
from mlx_realign.config import TrainSettings
from mlx_realign.distributions import divergence
from mlx_realign.drift import Displacement, Limit, Probe, thinned
from mlx_realign.policy import Policy
from mlx_realign.workers import Workers

# ------------------------------------------------------------------ measuring


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def kl(now: np.ndarray, start: np.ndarray) -> np.ndarray:
    """By its definition, in float64. Log-probs [..., V]."""
    return (np.exp(now) * (now - start)).sum(-1)


def by_hand(policy: Policy, examples: list[Example]) -> np.ndarray:
    """Log-probs [n, V] at every trained token of every row: rows alone and unpadded through the bare model."""
    found = []
    for prompt, completions, *_ in examples:
        for tokens, mask in completions:
            logits = policy.model(mx.array(np.concatenate([prompt, tokens]))[None])[0].astype(mx.float32)
            found.append(log_softmax(np.array(logits))[len(prompt) - 1 : -1][mask])
    return np.concatenate(found)


def nudge(policy: Policy, size: float) -> None:
    """Move every trained tensor by Gaussian noise of this size."""
    tensors: Any = tree_flatten(policy.model.trainable_parameters())
    noise = lambda i, v: size * mx.random.normal(v.shape, key=mx.random.key(i)).astype(v.dtype)  # noqa: E731
    policy.model.update(tree_unflatten([(k, v + noise(i, v)) for i, (k, v) in enumerate(tensors)]))


KINDS = {
    "lora": {},
    "dora": {"dora": True},
    "full_with_its_tied_head": {"full": True},
    "full_with_its_own_head": {"full": True, "arch": "qwen2"},
    "head_and_embedding_adapted": {"lora_targets": "q_proj,embed_tokens"},
    "quantised": {"quantize": 4, "cpu_dequantize": "never"},
    "checkpointed": {"grad_checkpoint": True},
    "compiled": {"compile": "on"},
    "not_sharing_prompts": {"arch": "mamba2"},
}


@pytest.mark.parametrize("size", [0.05, 1e-4])
@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_is_that_of_whole_logits(tmp_path, kind, size):
    options = dict(KINDS[kind])
    folder = write_model_folder(tmp_path / "model", options.pop("arch", "llama"))
    policy = Policy.from_settings(TrainSettings(model=str(folder), data="rows", **options))
    if not policy.compiled:
        policy.workers = Workers(2)
    examples = [example._replace(completions=example.completions[:1]) for example in make_examples(SHAPES)]
    probe = Probe(policy, examples, seed=0, batch_size=3)
    assert probe.positions == sum(e.completions[0].mask.sum() for e in examples)  # few enough for all to count
    nudge(policy, 0.02)  # the start of a stage need not be the base
    probe.begin()
    start = by_hand(policy, examples)
    assert probe.measure() == 0
    nudge(policy, size)
    expected = kl(by_hand(policy, examples), start).mean()
    assert expected > size**2 / 10
    assert probe.measure() == pytest.approx(expected, rel=1e-4 if size > 0.01 else 2e-2)


def test_a_probe_is_64_positions_of_8_rows_chosen_by_the_seed(tiny_model_dir):
    policy = Policy.load(str(tiny_model_dir))
    rows = make_examples([(5 + i, [30, 40]) for i in range(20)])
    for i, row in enumerate(rows):
        rows[i] = row._replace(line=i + 1)
    probe, again, other = (Probe(policy, rows, seed=seed, batch_size=4) for seed in (3, 3, 4))
    lines = [example.line for example in probe.examples]
    assert (probe.positions, len(lines), len(set(lines)), len(probe.batches)) == (64, 8, 8, 2)
    assert lines == sorted(lines) == [example.line for example in again.examples]
    assert lines != [example.line for example in other.examples]
    taken = [len(example.completions[0].tokens) for example in probe.examples]
    assert taken == [30, 40] * 4  # chosen, rejected, chosen ...
    few = Probe(policy, rows[:3], seed=0, batch_size=4)
    assert few.positions == 3 * 21  # a third of 64 each
    probe.begin()
    assert [start.shape for start in probe.start] == [(32, 320)] * 2 and probe.start[0].dtype == mx.float32


def test_thinning_spreads_the_marks_and_drops_what_follows_them():
    tokens = np.arange(120, dtype=np.int32)
    mask = (tokens >= 10) & (tokens < 110)  # 100 trained ones: 10 ... 109
    row = Example(
        np.array([1]), (Completion(tokens, mask), Completion(tokens[:4], tokens[:4] > 1)), 7, "k", {"margin": 1}
    )
    found, one = thinned(row, 0, 8), thinned(row, 3, 8)
    (kept, marks), (short, every) = found.completions[0], one.completions[0]
    assert np.flatnonzero(marks).tolist() == [10 + i for i in (0, 14, 28, 42, 57, 71, 85, 99)]
    assert kept.tolist() == list(range(110)) and found.extras == {}
    assert np.flatnonzero(every).tolist() == [2, 3] and short.tolist() == [0, 1, 2, 3]
    assert np.flatnonzero(thinned(row, 0, 1).completions[0].mask).tolist() == [10]


@pytest.mark.parametrize(("size", "rel"), [(3.0, 1e-5), (0.1, 1e-5), (1e-3, 1e-3), (1e-4, 2e-2)])
def test_divergence_is_right_when_tiny(size, rel):
    """At 1e-4 it is 5e-9, a hundredth of what one float32 log-prob is rounded by."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (16, 5000))
    now, start = log_softmax(logits + size * rng.normal(size=logits.shape)), log_softmax(logits)
    found = np.array(divergence(mx.array(now.astype(np.float32)), mx.array(start.astype(np.float32))))
    np.testing.assert_allclose(found, kl(now, start), rtol=rel)


def test_divergence_of_certainties():
    """Nearly all on one token, then on another: KL = log(p / q) = 200. A token that is excluded counts nothing."""
    logits = np.array([[200.0, 0.0, -np.inf], [0.0, 200.0, -np.inf]])
    with np.errstate(invalid="ignore"):
        p, q = mx.array(log_softmax(logits).astype(np.float32))
    assert divergence(p[None], q[None]).item() == pytest.approx(200, rel=1e-6)
    assert divergence(p[None], p[None]).item() == 0


# ------------------------------------------------------------------ acting


def test_lower_halves_each_time_and_says_so():
    limit = Limit(0.1, "lower")
    assert limit.judge(10, 0.1, last=False) is None and limit.factor == 1
    said = limit.judge(20, 0.1234, last=False)
    assert said == (
        "step 20: the KL to the start is 0.123 nats per token, above --kl-max 0.1: "
        "the learning rate is halved from here on, to 0.5 of the schedule's"
    )
    assert limit.judge(30, 0.05, last=False) is None and limit.factor == 0.5
    assert limit.judge(40, math.nan, last=False) and limit.factor == 0.25  # no number is no small one
    assert "no step is left to bring it back" in str(limit.judge(50, 0.2, last=True)) and limit.factor == 0.25
    assert not limit.stopped and limit.back_to is None
    assert Limit(None, "lower").judge(10, 9.9, last=False) is None


def test_stop_stops_and_has_nothing_to_go_back_to():
    limit = Limit(0.1, "stop")
    assert not limit.keep(5, 0.01) and not limit.stopped
    assert str(limit.judge(10, 0.2, last=False)).endswith("above --kl-max 0.1: the run stops here")
    assert limit.stopped and limit.back_to is None and limit.factor == 1


def test_rollback_goes_to_the_best_evaluation_within_the_limit_or_the_newest_state():
    limit = Limit(0.1, "rollback")
    assert limit.keep(0, 0.0) and limit.keep(10, 0.02) and limit.safe == (10, None)
    assert not limit.keep(12, None) and not limit.keep(15, None, 0.1)  # not measured
    assert not limit.keep(16, 0.11) and not limit.keep(17, math.nan)  # not within
    assert limit.keep(20, 0.05, 0.6)
    assert not limit.keep(30, 0.06) and not limit.keep(40, 0.07, 0.61)
    assert limit.keep(50, 0.08, 0.5) and limit.back_to is None
    assert str(limit.judge(60, 0.2, last=True)).endswith(
        "the run stops and its result is the policy after step 50, the best evaluation within it (loss 0.5000)"
    )
    assert limit.stopped and limit.back_to == 50
    soon = Limit(0.1, "rollback")
    soon.keep(0, 0.0)
    assert "after step 0, where it began: lower --learning-rate" in str(soon.judge(10, 0.2, last=False))


# ------------------------------------------------------------------ listening


def rows(chosen: list[float], rejected: list[float], kind: str = "rewards") -> list[dict[str, Any]]:
    both = zip(chosen, rejected, strict=True)
    return [{"step": i + 1, f"{kind}/chosen": c, f"{kind}/rejected": r} for i, (c, r) in enumerate(both)]


def told(relative: bool, series: list[dict[str, Any]]) -> list[int]:
    """Steps after which it spoke."""
    heard = Displacement(relative)
    return [row["step"] for row in series if heard.hear(row)]


def around(mean: float, count: int = 20) -> list[float]:
    """mean + 1, mean - 1, mean + 1 ...: the standard error of 20 of them is 1 / sqrt(19) = 0.2294."""
    return [mean + (-1) ** i for i in range(count)]


def test_rewards_are_held_against_zero_and_four_standard_errors():
    assert told(True, rows(around(-0.92), around(-5))) == [20]
    assert told(True, rows(around(-0.91), around(-5))) == []  # 4 x 0.2294 = 0.9177
    assert told(True, rows(around(-5), around(-0.91))) == []  # rejected must fall as well
    assert told(True, rows(around(-5, 19), around(-5, 19))) == []
    assert told(True, rows([0.1] * 90, [-0.3] * 90)) == []  # as it should be
    assert told(True, rows([-1e-6] * 90, [-1e-6] * 90)) == []  # rounding


def test_it_is_said_once_and_names_the_remedies():
    series = rows([0.2] * 20 + [-0.2] * 60, [-0.3] * 80)
    heard = Displacement(relative=True)
    said = [line for row in series if (line := heard.hear(row))]
    assert len(said) == 1
    assert "--loss-type sigmoid,sft --loss-weights 1,0.2" in said[0] and "dpop" in said[0] and "--beta" in said[0]
    # After k falls the mean is 0.2 - 0.02 k and its error sqrt((0.04 - mean^2) / 19): first below -4 errors at k = 17.
    assert said[0].startswith("step 37: ") and "rewards/chosen by 0.14 and rewards/rejected by 0.3" in said[0]


def test_log_probs_are_held_against_those_of_the_first_steps():
    """The standard error of the difference of two such means is sqrt(2 / 19) = 0.3244."""
    start = around(-50)
    fallen, not_enough = around(-51.31), around(-51.29)
    assert told(False, rows(start + fallen, start + fallen, "logps")) == [40]
    assert told(False, rows(start + not_enough, start + fallen, "logps")) == []
    assert told(False, rows(start + start, start + fallen, "logps")) == []
    assert told(False, rows(start + fallen, start + fallen, "rewards")) == []  # of a method without a reference


def test_methods_without_pairs_are_not_heard():
    heard = Displacement(relative=True)
    assert not any(heard.hear({"step": i, "loss": -i}) for i in range(50))
    assert heard.last == [] and not heard.hear({"step": 1, "rewards/chosen": math.nan, "rewards/rejected": 0.0})


@pytest.mark.parametrize("relative", [True, False])
def test_what_it_remembers_is_plain(relative):
    """Written as JSON and read by another one in the middle, it speaks after the same step."""
    kind = "rewards" if relative else "logps"
    series = rows(around(1, 30) + around(-4, 30), around(1, 30) + around(-4, 30), kind)
    for cut in (5, 25, 35):
        one, two = Displacement(relative), Displacement(relative)
        spoken = [row["step"] for row in series[:cut] if one.hear(row)]
        vars(two).update(json.loads(json.dumps(vars(one))))
        assert spoken + [row["step"] for row in series[cut:] if two.hear(row)] == told(relative, series)
    assert len(told(relative, series)) == 1
