# SPDX-License-Identifier: Apache-2.0
"""A steered chat that goes on from its cache says what a new one says to the same conversation."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_realign import capture, generate, taps
from mlx_realign.policy import Policy
from mlx_realign.steering import Condition, Schedule, Steer, steer
from mlx_realign.vectors import Direction

FIRST = [9, 4, 31, 7, 12, 5, 40, 8]
MORE = [17, 6, 22, 3, 10]


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    found = Policy.load(str(tiny_model_dir))
    found.tokenizer.eos_token_ids = set()
    return found


def direction(policy: Policy, seed: int = 3) -> Direction:
    width = policy.model.args.hidden_size  # type: ignore[union-attr]
    rng = np.random.default_rng(seed)
    return Direction({block: rng.normal(size=width).astype(np.float32) for block in (0, 1)})


def answered(talk: generate.Session, prompt: list[int]) -> tuple[list[int], np.ndarray, int]:
    """Tokens, the log-probs float32 [8, V] they came with, and how many columns the first block computed."""
    columns: list[int] = []
    count = lambda h, _: (columns.append(h.shape[1]), h)[1]  # noqa: E731
    handle = taps.put(talk.policy.model, taps.blocks(talk.policy.model)[0], count)
    pieces = list(talk.stream(prompt))
    handle.remove()
    return [one.token for one in pieces], np.stack([np.array(one.logprobs) for one in pieces]), sum(columns)


def session(policy: Policy) -> generate.Session:
    return generate.Session(policy, generate.Settings(model="", max_new_tokens=8))


CASES: list[tuple[dict[str, Any], int]] = [  # how many tokens of the first turn's 8 + 8 need not be computed again
    ({"positions": "all"}, 16),
    ({"positions": "3:12"}, 16),
    ({"positions": "prompt"}, 8),
    ({"positions": "generated"}, 8),
    ({"positions": "last"}, 7),
    ({"positions": "-3:"}, 5),
    ({"positions": "1:-4"}, 4),
    ({"positions": "all", "schedule": Schedule("decay", 2)}, 8),
]


@pytest.mark.parametrize(
    ("changes", "kept"), CASES, ids=lambda x: str(x.get("positions")) if isinstance(x, dict) else ""
)
def test_a_second_turn_is_steered_as_a_first_one_would_be(policy, changes, kept):
    with steer(policy, Steer(direction(policy), 0.5, **changes)):
        talk = session(policy)
        said, _, _ = answered(talk, FIRST)
        longer = [*FIRST, *said, *MORE]
        tokens, logps, columns = answered(talk, longer)
        expected, fresh, _ = answered(session(policy), longer)
    assert tokens == expected
    np.testing.assert_allclose(logps, fresh, atol=1e-4)
    assert columns == len(longer) - kept + 8


@pytest.mark.parametrize("reading", ["last", "mean"])
@pytest.mark.parametrize("more", [MORE, MORE[:2]], ids=len)  # of two tokens the first is computed by itself
def test_a_condition_that_opened_for_a_first_turn_is_asked_anew_at_the_second(policy, reading, more):
    axis = direction(policy, 5)
    positions = [-1] if reading == "last" else list(range(-len(FIRST), 0))
    score = float(capture.collect(policy, [FIRST], positions=positions, blocks=[0])[0, 0].mean(0) @ axis.unit(0))
    gate = Condition(axis, 0, score - 0.01, "above", reading)
    base, _, _ = answered(session(policy), FIRST)
    with steer(policy, Steer(direction(policy), 0.5, condition=gate)):
        talk = session(policy)
        said, _, _ = answered(talk, FIRST)
        assert said != base
        _, logps, _ = answered(talk, [*FIRST, *said, *more])
        _, fresh, _ = answered(session(policy), [*FIRST, *said, *more])
    np.testing.assert_allclose(logps, fresh, atol=1e-4)


def test_what_was_computed_under_other_numbers_is_not_gone_on_from(policy):
    talk = session(policy)
    with steer(policy, Steer(direction(policy), 0.5)) as steering:
        answered(talk, FIRST)
        for change in (lambda: steering.set(coefficient=-0.5), steering.off, steering.on):
            change()
            _, logps, _ = answered(talk, [*FIRST, *MORE])
            np.testing.assert_allclose(logps, answered(session(policy), [*FIRST, *MORE])[1], atol=1e-4)
    _, logps, _ = answered(talk, [*FIRST, *MORE])
    np.testing.assert_allclose(logps, answered(session(policy), [*FIRST, *MORE])[1], atol=1e-4)
