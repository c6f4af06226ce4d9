# SPDX-License-Identifier: Apache-2.0
"""Proof, on the very model that was loaded, that the fast ways give what the plain ones do; what does not is not used.

A tiny random batch with unequal pads, several completions per prompt and prompts longer than the (shrunk) attention
window goes through: shared prompts against plain rows (log-probs and gradients), the chunked head against the model's
own logits, checkpointed layers against ordinary ones, adapters off against their base.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import adapter, forward
from .batch import Batch, LossOutput, Scores
from .kernels import token_scores
from .policy import Policy

WINDOW = 4  # attention windows are shrunk to this for the check, so that a short prompt is longer than them
LIMIT = {mx.float32: 2e-4, mx.bfloat16: 8e-2, mx.float16: 2e-2}  # relative to the largest entry


class Checks(NamedTuple):
    """What was found: numbers for config.json, sentences for the user."""

    results: dict[str, str]
    notes: list[str]


def run(policy: Policy) -> Checks:
    """Check a policy and set its ways accordingly. Nothing of the model is changed."""
    results, notes = {}, []
    batch, limit = probe(policy.vocabulary), LIMIT[policy.dtype]
    with shrunk_windows(policy.model):
        policy.sharing = False
        plain = _measure(policy, batch)
        reason = forward.shareable(policy.model)
        if reason is None:
            policy.sharing = True
            reason, found = _compare(policy, batch, plain, limit)
            results["shared_prompts"] = found if reason is None else f"off: {reason}"
        else:
            results["shared_prompts"] = f"off: {reason}"
        if reason:
            policy.sharing = False
            notes.append(f"prompts are not shared between completions, each row is computed alone: {reason}")
        results["chunked_head"] = _head(policy, batch, limit, notes)
        results["adapter_off"] = _adapter_off(policy, batch)
        if any(hasattr(type(layer), "checkpointed_from") for layer in policy.model.layers):
            forward.uncheckpoint_layers(policy.model)
            straight = _measure(policy, batch)
            forward.checkpoint_layers(policy.model)
            reason, found = _compare(policy, batch, straight, limit)
            results["checkpointed_layers"] = found if reason is None else f"off: {reason}"
            if reason:
                forward.uncheckpoint_layers(policy.model)
                notes.append(f"gradient checkpointing is off: {reason}")
    return Checks(results, notes)


def probe(vocabulary: int) -> Batch:
    """Two prompts of 9 and 7 tokens with 2 and 3 completions of unequal length."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(3, max(4, vocabulary - 1), shape, dtype=np.int32)  # noqa: E731
    pad, rows = np.array([0, 2], np.int32), np.array([0, 0, 1, 1, 1], np.int32)
    prompt = np.where(np.arange(9)[None] >= pad[:, None], draw(2, 9), 0)
    mask = np.arange(6)[None] < np.array([6, 4, 5, 2, 6])[:, None]
    arrays = (prompt, pad, np.where(mask, draw(5, 6), 0), rows, mask, np.flatnonzero(mask).astype(np.int32))
    return Batch(*map(mx.array, arrays), extras={})


@contextmanager
def shrunk_windows(model: nn.Module) -> Iterator[None]:
    """Inside, every sliding attention window of the model is 4 tokens."""
    before: list[tuple[Any, str, int]] = []
    for module in (m for _, m in model.named_modules()):
        for holder in (module, module.get("args", getattr(module, "args", None))):
            for name in ("window_size", "sliding_window", "sliding_window_size"):
                value = getattr(holder, name, None) if holder is not None else None
                if isinstance(value, int) and not isinstance(value, bool) and value > WINDOW:
                    before.append((holder, name, value))
                    setattr(holder, name, WINDOW)
    try:
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def _measure(policy: Policy, batch: Batch) -> dict[str, mx.array]:
    """Log-probs and gradients of a weighted sum of them; adapters start at zero, so theirs are nudged for the check."""
    weights = mx.random.normal(batch.mask.shape, key=mx.random.key(1))
    kept: list[mx.array] = []

    def loss(scores: Scores, part: Batch) -> LossOutput:
        kept.append(scores.logps)
        return LossOutput((scores.logps * weights).sum(), mx.array(1.0), {"logps": (scores.logps, mx.array(1.0))})

    with nudged(policy.model):
        out, grads = policy.differentiate(batch, loss)
        mx.eval(out, grads)
    return {"log-probs": out.metrics["logps"][0], **{f"the gradient of {k}": v for k, v in tree_flatten(grads)}}


@contextmanager
def nudged(model: nn.Module) -> Iterator[None]:
    """Inside, every lora_b is a small random matrix, so that the adapter's own gradients are not all zero."""
    before = adapter.state(model)
    rand = lambda i, v: mx.random.normal(v.shape, key=mx.random.key(i)) * 0.02  # noqa: E731
    model.load_weights(
        [(k, rand(i, v)) for i, (k, v) in enumerate(before.items()) if k.endswith("lora_b")], strict=False
    )
    yield
    model.load_weights(list(before.items()), strict=False)


def _compare(policy: Policy, batch: Batch, expected: dict[str, mx.array], limit: float) -> tuple[str | None, str]:
    """(what is wrong or None, the largest relative difference as text)."""
    try:
        found = _measure(policy, batch)
    except Exception as error:  # whatever an architecture raises, training goes on by the plain way
        return f"it raised {type(error).__name__}: {str(error).splitlines()[0][:160]}", ""
    scale = max(mx.abs(v).max().item() for k, v in expected.items() if k != "log-probs") if len(expected) > 1 else 1.0
    worst = ("", 0.0)
    for name, value in expected.items():
        size = mx.abs(value).max().item() if name == "log-probs" else max(mx.abs(value).max().item(), 1e-3 * scale)
        gap = (mx.abs(found[name].astype(mx.float32) - value.astype(mx.float32)).max() / max(size, 1e-12)).item()
        if not gap <= worst[1]:
            worst = (name, gap)
    if not worst[1] <= limit:
        return f"{worst[0]} differs by {worst[1]:.1e} (relative)", ""
    return None, f"exact to {worst[1]:.1e}"


def _head(policy: Policy, batch: Batch, limit: float, notes: list[str]) -> str:
    """Chunked log-probs against log-softmax of the model's own logits."""
    tokens = batch.prompt[:1]
    hidden = policy.body.hidden(tokens)[0, :-1]
    chunked = token_scores.fused(policy.body.head(), hidden, tokens[0, 1:]).logps
    logits = policy.model(tokens)[0, :-1].astype(mx.float32)
    whole = mx.take_along_axis(logits - mx.logsumexp(logits, -1, keepdims=True), tokens[0, 1:, None], 1)[:, 0]
    gap = (mx.abs(chunked - whole).max() / mx.abs(whole).max()).item()
    if not gap <= limit:
        policy.whole_logits = True
        notes.append(f"the head is not chunked: log-probs differ by {gap:.1e} from the model's own")
        return f"off: differs by {gap:.1e}"
    return f"exact to {gap:.1e}"


def _adapter_off(policy: Policy, batch: Batch) -> str:
    """With adapters off, moved adapters must not be seen at all."""
    if not adapter.adapters_of(policy.model):
        return "no adapter"
    with policy.adapter_off():
        before = policy.scores(batch).logps
        mx.eval(before)
        with nudged(policy.model):
            after = policy.scores(batch).logps
            mx.eval(after)
    if not mx.array_equal(before, after).item():
        raise RuntimeError("the adapter still acts when it is off; the reference would be wrong")
    return "exact"
