# SPDX-License-Identifier: Apache-2.0
"""Attention of rows that share prompts equals attention with a copy of the prompt for each row."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_realign.kernels import exp
from mlx_realign.kernels.grouped_attention import Groups, fused, reference

SIZE, HEADS, SHARED, COLUMNS, OWN = 8, 6, 2, 5, 4


def arrays(rows: int, prompts: int) -> tuple[Any, ...]:
    draw = lambda i, *shape: mx.random.normal(shape, key=mx.random.key(i))  # noqa: E731
    prompt = (draw(1, prompts, SHARED, COLUMNS, SIZE), draw(2, prompts, SHARED, COLUMNS, SIZE))
    own = (draw(3, rows, SHARED, OWN, SIZE), draw(4, rows, SHARED, OWN, SIZE))
    return 2 * draw(0, rows, HEADS, 1, SIZE), prompt, own


def groups_of(row_prompt: list[int], members: list[list[int]], place: list[int], regular: bool) -> Groups:
    return Groups(mx.array(row_prompt), mx.array(members), mx.array(place), regular)


REGULAR = groups_of([0, 0, 1, 1], [[0, 1], [2, 3]], [0, 1, 2, 3], True)
RAGGED = groups_of([0, 1, 1, 0, 1], [[0, 3, 0], [1, 2, 4]], [0, 3, 4, 1, 5], False)


def plain(q: Any, prompt: Any, own: Any, groups: Groups, scale: float, mask: Any, sinks: Any) -> np.ndarray:
    """Row by row and head by head in float64."""
    out = np.zeros((q.shape[0], HEADS, 1, SIZE))
    for row, p in enumerate(np.array(groups.row_prompt)):
        for head in range(HEADS):
            shared = head // (HEADS // SHARED)
            both = zip(prompt, own, strict=True)
            k, v = (np.concatenate([np.array(a)[p, shared], np.array(b)[row, shared]]) for a, b in both)
            scores = np.array(q, np.float64)[row, head, 0] @ k.T * scale
            if mask is not None:
                scores = np.where(np.array(mask)[row, 0, 0], scores, -np.inf)
            extra = [] if sinks is None else [float(sinks[head].item())]
            top = max([*scores, *extra])
            weights = np.exp(scores - top)
            out[row, head, 0] = weights @ v / (weights.sum() + sum(np.exp(x - top) for x in extra))
    return out


@pytest.mark.parametrize("groups", [REGULAR, RAGGED], ids=["regular", "ragged"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sinks", [None, mx.linspace(-1, 3, HEADS)], ids=["", "sinks"])
def test_it_equals_attention_over_copies(groups, masked, sinks):
    rows = groups.row_prompt.size
    q, prompt, own = arrays(rows, groups.members.shape[0])
    mask = None
    if masked:  # one row sees nothing of its prompt, another only its newest token
        seen = np.random.default_rng(0).random((rows, 1, 1, COLUMNS + OWN)) < 0.6
        seen[0, ..., :COLUMNS], seen[1, ..., :-1], seen[..., -1] = False, False, True
        mask = mx.array(seen.tolist())
    found = np.array(fused(q, prompt, own, groups, scale=0.3, mask=mask, sinks=sinks))
    assert found == pytest.approx(plain(q, prompt, own, groups, 0.3, mask, sinks), abs=1e-5)
    same = np.array(reference(q, prompt, own, groups, scale=0.3, mask=mask, sinks=sinks))
    assert found == pytest.approx(same, abs=1e-5)


def test_large_scores_stay_finite():
    q, prompt, own = arrays(4, 2)
    found = fused(1e4 * q, prompt, own, REGULAR, scale=1.0)
    assert np.isfinite(np.array(found)).all()


def test_lower_precision_keeps_its_dtype():
    q, prompt, own = arrays(4, 2)
    half = lambda pair: tuple(x.astype(mx.bfloat16) for x in pair)  # noqa: E731
    found = fused(q.astype(mx.bfloat16), half(prompt), half(own), REGULAR, scale=0.3)  # type: ignore[arg-type]
    assert found.dtype == mx.bfloat16
    exact = np.array(fused(q, prompt, own, REGULAR, scale=0.3))
    assert np.array(found.astype(mx.float32)) == pytest.approx(exact, abs=0.05)


def test_no_pass_over_the_scores_is_spent_on_their_upper_bound(monkeypatch: pytest.MonkeyPatch):
    """Scores minus their maximum are never above 0, so exp need not clip them from above: one pass a step less."""
    if not exp.available():
        pytest.skip("a kernel of CPUs")
    clipped: list[tuple[int, ...]] = []
    clip = mx.clip
    monkeypatch.setattr(mx, "clip", lambda x, *bounds: (clipped.append(x.shape), clip(x, *bounds))[1])
    q, prompt, own = arrays(4, 2)
    fused(q, prompt, own, REGULAR, scale=0.3, sinks=mx.zeros(HEADS))
    exp.exp(q)
    assert clipped == [q.shape]
