# SPDX-License-Identifier: Apache-2.0
"""Gates stay with their rows while rows come and go, in compiled steps too, and in the trainer's pass."""

import numpy as np
import pytest
from test_steering_condition import AXIS, PROMPTS, WAYS, behaviour, ends_at_0, halfway, policy

from mlx_realign import data, rollout
from mlx_realign.batch import Completion, Example
from mlx_realign.errors import UserError
from mlx_realign.sampling import Sampling
from mlx_realign.steering import Condition, steer

__all__ = ["ends_at_0", "policy"]  # fixtures


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize(
    ("reading", "score", "how"),
    [*((*way, "") for way in WAYS), *(("mean", "signed", how) for how in ("compiled", "own"))],
)
def test_rows_of_a_rollout_keep_their_gates_as_rows_come_and_go(policy, reading, score, above, how):
    """Behaviour behind block 0 or 1, condition at block 1 or 0; prompts three at a time, two rows each."""
    block = 1 if above else 0
    asked, opens = halfway(policy, reading, score, block)
    one = behaviour(asked, blocks=(0,) if above else (1,))
    greedy = Sampling(max_new_tokens=7, temperature=0)
    base = rollout.rollout(policy, PROMPTS, greedy)
    expected = []
    for prompt, is_open, (plain,) in zip(PROMPTS, opens, base, strict=True):
        first = len(prompt) if above else len(prompt) - 1  # below its block a gate opens one token later
        with steer(policy, behaviour(None, blocks=one.blocks, positions=f"{first}:")):
            expected.append(rollout.rollout(policy, [prompt], greedy)[0][0] if is_open else plain)
    if how == "compiled":
        policy.compile()
    policy.sharing = how != "own"  # otherwise over mlx-lm's own caches
    with steer(policy, one):
        found = rollout.rollout(policy, PROMPTS, greedy, group_size=2, rows=6)
    changed = 0
    for group, other, (plain,) in zip(found, expected, base, strict=True):
        for row in group:
            assert row.tokens.tolist() == other.tokens.tolist()
            np.testing.assert_allclose(row.logps, other.logps, atol=2e-4)
        changed += np.abs(other.logps[1] - plain.logps[1]) > 1e-3
    assert changed == sum(opens)


@pytest.mark.parametrize(("reading", "score"), WAYS)
def test_the_trainer_s_pass_opens_the_gates_that_decoding_opens(policy, reading, score):
    asked, opens = halfway(policy, reading, score)
    drawn = Sampling(max_new_tokens=5)
    with steer(policy, behaviour(asked)):
        groups = rollout.rollout(policy, PROMPTS, drawn, group_size=2, seed=4, rows=5)
        for sharing in (True, False):
            policy.sharing = sharing
            batch = data.collate(
                [
                    Example(
                        np.array(prompt, np.int32),
                        tuple(Completion(one.tokens, np.ones(len(one.tokens), bool)) for one in group),
                        0,
                        "",
                        {},
                    )
                    for prompt, group in zip(PROMPTS, groups, strict=True)
                ]
            )
            logps = np.array(policy.token_logps(batch))
            for one, row in zip(sum(groups, []), logps, strict=True):
                np.testing.assert_allclose(row[: len(one.tokens)], one.logps, atol=2e-4)


def test_rows_have_conditions_of_their_own_and_thresholds_are_set_without_a_trace(policy):
    asked, opens = halfway(policy, "last", "signed")
    always = Condition(AXIS, 0, -1e6)
    rows = [[behaviour(asked)], [behaviour(always)], [behaviour(None)]]
    greedy = Sampling(max_new_tokens=4, temperature=0)
    variants = [0, 1, 2, 0, 1, 0]
    base = rollout.rollout(policy, PROMPTS, greedy)
    with steer(policy, rows=rows) as steering:
        found = rollout.rollout(policy, PROMPTS, greedy, variants=variants)
        for i, variant in enumerate(variants):
            acts = opens[i] if variant == 0 else True
            assert (found[i][0].logps.tolist() == base[i][0].logps.tolist()) == (not acts)
        steering.set(row=1, threshold=1e6)
        found = rollout.rollout(policy, PROMPTS, greedy, variants=[1] * 6)
        assert all(one[0].logps.tolist() == two[0].logps.tolist() for one, two in zip(found, base, strict=True))
        with pytest.raises(UserError, match="no condition"):
            steering.set(row=2, threshold=0.0)
