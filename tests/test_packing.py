# SPDX-License-Identifier: Apache-2.0
"""Rows side by side: the same numbers as each alone, next to no padding, and no run where that cannot be."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from policy_tools import make_policy
from test_exact_runs import compared, run

from mlx_realign import data, forward, packing, selfcheck
from mlx_realign.batch import Batch, Completion, Example, LossOutput, Scores
from mlx_realign.errors import UserError

SHAPES = [(5, 9), (14, 3), (1, 4), (24, 11), (2, 2), (7, 30)]


def examples() -> list[Example]:
    rng = np.random.default_rng(1)
    made = []
    for prompt, completion in SHAPES:
        tokens = rng.integers(3, 60, prompt + completion).astype(np.int32)
        mask = np.arange(completion) >= completion // 4
        made.append(Example(tokens[:prompt], (Completion(tokens[prompt:], mask),), 0, "", {}))
    return made


def weighed(scores: Scores, batch: Batch) -> LossOutput:
    return LossOutput((mx.cos(batch.completion * 1.0) * scores.logps).sum(), mx.array(1.0), {})


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3_text", "gpt_oss", "qwen3_moe", "mistral"])
def test_packed_rows_have_the_log_probs_and_gradients_of_each_alone(arch: str):
    policy, batch = make_policy(arch), data.collate_exact(examples(), 0)
    selfcheck.set_packing(policy, on=True)
    for checkpointed in (False, True):
        if checkpointed:
            forward.checkpoint_layers(policy.model)
        found = []
        for policy.packing in (False, True):
            slopes: Any = tree_flatten(policy.gradients(batch, weighed)[1])
            found.append((np.array(policy.token_logps(batch)), dict(slopes)))
        (alone, theirs), (packed, ours) = found
        assert np.abs(alone - packed).max() <= 1e-5
        for name, value in ours.items():
            assert mx.abs(value - theirs[name]).max() <= 1e-5 * mx.abs(theirs[name]).max() + 1e-9, name


def test_long_packed_rows_do_not_lose_their_positions():
    """A thousand tokens in a packed row: angles of late positions have fewer digits; what each row loses keeps 1e-5."""
    rng = np.random.default_rng(2)
    rows = [rng.integers(3, 60, 64).astype(np.int32) for _ in range(32)]
    made = [Example(row[:4], (Completion(row[4:], np.ones(60, bool)),), 0, "", {}) for row in rows]
    policy, batch, found = make_policy("llama"), data.collate_exact(made, 0), []
    for policy.packing in (False, True):
        found.append(np.array(policy.token_logps(batch)))
    alone, packed = (x.sum(1) for x in found)
    assert np.abs(packed / alone - 1).max() <= 1e-5
    assert np.abs(found[0] - found[1]).max() <= 2e-4


@pytest.mark.parametrize("arch", ["mamba2", "lfm2", "gemma2"])
def test_models_that_see_other_rows_are_refused_in_one_line(arch: str):
    policy = make_policy(arch)
    with pytest.raises(UserError, match="--pack: .* leave it out") as error:
        selfcheck.set_packing(policy, on=True)
    assert "\n" not in str(error.value) and not policy.packing


@pytest.mark.parametrize("options", [{"method": "dpo"}, {"method": "sft", "router_aux_loss_coef": 0.1}])
def test_what_cannot_be_packed_is_refused(options: dict[str, Any], tmp_path: Path):
    method = options["method"]
    with pytest.raises(UserError, match="--pack"):
        run(method, {"pack": True} | {k: v for k, v in options.items() if k != "method"}, tmp_path)


def test_a_plan_for_another_device_needs_a_dry_run(tmp_path: Path):
    with pytest.raises(UserError, match="--plan-for .* --dry-run"):
        run("sft", {"plan_for": "metal"}, tmp_path)


def test_packed_rows_are_nearly_full():
    lengths = np.maximum(2, np.round(40 * np.exp(0.8 * np.random.default_rng(0).normal(size=64)))).astype(int)
    bins, width = packing.fitted(lengths)
    assert sorted(row for rows in bins for row in rows) == list(range(64))
    assert all(lengths[rows].sum() <= width for rows in bins)
    assert 1 - lengths.sum() / (len(bins) * width) <= 0.03


def test_a_run_has_the_same_losses_packed(tmp_path: Path):
    plain, packed = (run("sft", {"pack": pack}, tmp_path / str(pack)) for pack in (False, True))
    for one, other in zip(packed, plain, strict=True):
        for name in ("loss", "grad_norm", "num_tokens", "entropy"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), (one["step"], name)


def test_a_run_has_the_same_losses_packed_and_compiled_on_a_gpu(tmp_path: Path):
    compared({"sft": {"pack": True}}, tmp_path)
