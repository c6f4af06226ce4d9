# SPDX-License-Identifier: Apache-2.0
"""The GPU's form of the token scores against their reference, on the user's device, before anything trusts it.

Hidden states and weights are quarters and halves, so that every logit is the same number in any dtype, in any order of
adding and with products rounded to 10 bits. Many are equal, as in bfloat16 they are. Then values must agree as float32
does, whatever the dtype.
"""

from functools import cache
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .. import noise
from . import token_scores
from .token_scores import Head, Weight

TOLERANCE = 5e-5  # relative to the largest entry, float32: mx.logsumexp of so many numbers is off by 1e-5 on a CPU
SHORT_TOLERANCE = 2e-2  # of products of 16-bit numbers, or rounded to 10 bits: what is wrong is off by more
TOKENS, WIDTH, VOCABULARY, SLICE = 67, 64, 2500, 1024  # three slices; the last has fewer columns, no multiple of 8


def run(model: Any) -> list[str]:
    """Prove the form for the dtypes of a model's weights; a line for each dtype it is wrong in. On a CPU nothing."""
    if token_scores.on_cpu():
        return []
    notes = []
    for dtype in sorted({x.dtype for _, x in _flat(model) if _is_float(x)}, key=str):
        if trouble := trouble_with(dtype):
            name = str(dtype).removeprefix("mlx.core.")
            notes.append(f"kernel token_scores, {name}: {trouble}; slices in float32 are used")
        else:
            token_scores.proven.add(dtype)
    return notes


@cache
def trouble_with(dtype: mx.Dtype) -> str | None:
    """What is wrong with `token_scores.narrow` for hidden states of that dtype on this device, or None."""
    try:
        return next(filter(None, (_differs(kind, dtype) for kind in ("dense", "quantised"))), None)
    except Exception as error:  # what cannot run here must not stop training
        return f"failed ({error})"


def _differs(kind: str, dtype: mx.Dtype) -> str | None:
    steps = mx.random.randint(-1, 2, (VOCABULARY, WIDTH), key=mx.random.key(1))
    weight = _quantised(steps, dtype) if kind == "quantised" else Weight({"weight": (steps / 2).astype(dtype)}, {})
    hidden = (mx.random.randint(-2, 3, (TOKENS, WIDTH), key=mx.random.key(2)) / 4).astype(dtype)
    head = Head(lambda h: weight.logits(h, 0, VOCABULARY), VOCABULARY, weight)
    tokens = mx.random.randint(0, VOCABULARY, (TOKENS,), key=mx.random.key(3))
    tokens = mx.where(mx.arange(TOKENS) % 2 == 0, head.logits(hidden).argmax(-1).astype(mx.int32), tokens)
    cotangent = mx.random.normal((TOKENS,), key=mx.random.key(4))

    def ours(h: mx.array, gradient: bool = True) -> token_scores.Rows:
        form = lambda *given: token_scores.narrow(*given, size=SLICE)  # noqa: E731
        return token_scores.sliced(form, weight, VOCABULARY, h, tokens, gradient, True)

    exact = Head(lambda h: h @ (steps / 2).T, VOCABULARY)  # a float32 weight
    right = token_scores.reference(exact, hidden.astype(mx.float32), tokens)
    for found in (ours(hidden), ours(hidden, False)):
        for name, one, other in zip(right._fields, found, right, strict=True):
            if not (error := _distance(one, other)) <= TOLERANCE:
                return f"{name} of a {kind} head differs from its reference by {error:.1e}"
    slopes = [
        mx.grad(lambda h, f=f: (f(h).logps * cotangent).sum())(hidden)
        for f in (ours, lambda h: token_scores.reference(exact, h.astype(mx.float32), tokens))
    ]
    limit = TOLERANCE if noise.judged_as(dtype) == mx.float32 else SHORT_TOLERANCE
    error = _distance(*slopes)
    return None if error <= limit else f"the gradient of a {kind} head differs from its reference by {error:.1e}"


def _quantised(steps: mx.array, dtype: mx.Dtype) -> Weight:
    """Weights of 4 bits that are exactly steps / 2."""
    nibbles = (steps + 8).astype(mx.uint32).reshape(VOCABULARY, -1, 8)
    packed = (nibbles << (4 * mx.arange(8, dtype=mx.uint32))).sum(-1).astype(mx.uint32)
    scales = mx.full((VOCABULARY, WIDTH // 32), 0.5, dtype)
    return Weight(
        {"weight": packed, "scales": scales, "biases": -8 * scales}, {"group_size": 32, "bits": 4, "mode": "affine"}
    )


def _distance(found: mx.array, right: mx.array) -> float:
    found, right = found.astype(mx.float32), right.astype(mx.float32)
    return (mx.abs(found - right).max() / mx.maximum(mx.abs(right).max(), 1e-30)).item()


def _flat(model: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(model.parameters())
    return flat


def _is_float(x: mx.array) -> bool:
    return mx.issubdtype(x.dtype, mx.floating)
