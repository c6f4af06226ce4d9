# SPDX-License-Identifier: Apache-2.0
"""Proof, on the very model that was loaded, that the fast ways give what the plain ones do; what does not is not used.

A tiny random batch with unequal pads, several completions per prompt and prompts longer than the (shrunk) attention
window goes through: shared prompts against plain rows (log-probs and gradients), the chunked head against the model's
own logits, checkpointed layers against ordinary ones, adapters off against their base.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import adapter, forward
from .batch import Batch, LossOutput, Scores
from .errors import UserError
from .policy import Policy

WINDOW = 4  # attention windows are shrunk to this for the check, so that a short prompt is longer than them
WINDOWS = "window window_size sliding_window sliding_window_size attention_window_size loop_window_size".split()
# Relative, of a tensor's norm. On SmolLM2-135M rounding comes to 1e-4 in float32 (also over a 4-bit base), to 5e-2 in
# bfloat16; keys that get no gradient, positions off by one or a pad token that is seen come to more than 1 in both.
LIMIT = {mx.float32: 2e-3, mx.bfloat16: 2.5e-1, mx.float16: 5e-2}


class Checks(NamedTuple):
    """What was found: numbers for config.json, sentences for the user."""

    results: dict[str, str]
    notes: list[str]


def run(policy: Policy) -> Checks:
    """Check a policy and set its ways accordingly. Nothing of the model is changed.

    Raises UserError where the model's own forward pass cannot be differentiated: then there is nothing to train.
    """
    results, notes = {}, []
    batch, limit = probe(policy.vocabulary), LIMIT[policy.dtype]
    checkpointed = any(getattr(layer, "recomputed", False) for layer in forward.layers_of(policy.model))
    forward.uncheckpoint_layers(policy.model)
    with shrunk_windows(policy.model):
        expected = _by_the_models_own_code(policy, batch)
        reason = "the model has no layer of its own for it" if policy.body.module is None else None
        policy.body.whole = reason is not None
        reason, results["chunked_head"], found = _try(policy, batch, expected, limit, reason)
        if reason:
            policy.body.whole = True
            notes.append(f"the head is not cut into chunks, which takes more memory: {reason}")
        expected = found or expected
        reason = forward.shareable(policy.model)
        policy.sharing = reason is None
        reason, results["shared_prompts"], _ = _try(policy, batch, expected, limit, reason)
        if reason:
            policy.sharing = False
            notes.append(f"prompts are not shared between completions, each row is computed alone: {reason}")
        if checkpointed:
            forward.checkpoint_layers(policy.model)
            reason, results["checkpointed_layers"], _ = _try(policy, batch, expected, limit, None)
            if not reason and not forward.recomputing(policy.model):
                reason = (
                    f"a {policy.config.get('model_type')} model computes with the parts of its layers, not with them"
                )
                results["checkpointed_layers"] = f"off: {reason}"
            if reason:
                forward.uncheckpoint_layers(policy.model)
                notes.append(f"gradient checkpointing is off: {reason}")
        results["adapter_off"] = _adapter_off(policy, batch)
    return Checks(results, notes)


def probe(vocabulary: int) -> Batch:
    """Two prompts of 7 and 5 tokens with 2 and 1 completions of unequal length; small: every start pays for it."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(3, max(4, vocabulary - 1), shape, dtype=np.int32)  # noqa: E731
    pad, rows = np.array([0, 2], np.int32), np.array([0, 0, 1], np.int32)
    prompt = np.where(np.arange(7)[None] >= pad[:, None], draw(2, 7), 0)
    mask = np.arange(5)[None] < np.array([5, 3, 4])[:, None]
    arrays: Any = (prompt, pad, np.where(mask, draw(3, 5), 0), rows, mask, np.flatnonzero(mask).astype(np.int32))
    return Batch(*map(mx.array, arrays), extras={})


@contextmanager
def shrunk_windows(model: nn.Module) -> Iterator[None]:
    """Inside, every sliding attention window of the model is 4 tokens."""
    before: list[tuple[Any, str, int]] = []
    for module in (m for _, m in model.named_modules()):
        for holder in (module, *(getattr(module, name, None) for name in ("args", "config"))):
            for name in WINDOWS:
                value = getattr(holder, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > WINDOW:
                    before.append((holder, name, value))
                    setattr(holder, name, WINDOW)
    try:
        yield
    finally:
        for holder, name, value in before:
            setattr(holder, name, value)


def _by_the_models_own_code(policy: Policy, batch: Batch) -> dict[str, mx.array]:
    """Whole logits, every row alone, no layer recomputed."""
    policy.body.whole, policy.sharing = True, False
    try:
        found = _measure(policy, batch)
    except Exception as error:  # whatever an architecture raises, the user gets one line
        kind = policy.config.get("model_type")
        raise UserError(f"--model {policy.name}: a {kind} model cannot be trained here: {_said(error)}") from error
    if not mx.isfinite(found["log-probs"]).all():
        dtype = str(policy.dtype).rpartition(".")[2]
        raise UserError(f"--model {policy.name}: its log-probs are not finite in {dtype}; check it, or set --dtype")
    return found


def _measure(policy: Policy, batch: Batch) -> dict[str, mx.array]:
    """Log-probs and gradients of a weighted sum of them; adapters start at zero, so theirs are nudged for the check."""
    weights = mx.random.normal(batch.mask.shape, key=mx.random.key(1))
    kept: list[mx.array] = []

    def loss(scores: Scores, part: Batch) -> LossOutput:
        kept.append(scores.logps)
        return LossOutput((scores.logps * weights).sum(), mx.array(1.0), {"logps": (scores.logps, mx.array(1.0))})

    with nudged(policy.model):
        if policy.trained:
            out, grads = policy.differentiate(batch, loss)
        else:
            out, grads = loss(policy.scores(batch), batch), {}
        mx.eval(out, grads)
    slopes: Any = tree_flatten(grads)
    return {"log-probs": out.metrics["logps"][0], **{f"the gradient of {k}": v for k, v in slopes}}


@contextmanager
def nudged(model: nn.Module) -> Iterator[None]:
    """Inside, the adapter has moved a little at random, so that it acts and none of its gradients is all zero."""
    before = adapter.state(model)
    moved = lambda i, v: v + 0.02 * mx.random.normal(v.shape, key=mx.random.key(i))  # noqa: E731
    model.load_weights([(k, moved(i, v)) for i, (k, v) in enumerate(before.items())], strict=False)
    try:
        yield
    finally:
        model.load_weights(list(before.items()), strict=False)


def _try(
    policy: Policy, batch: Batch, expected: dict[str, mx.array], limit: float, reason: str | None
) -> tuple[str | None, str, dict[str, mx.array]]:
    """(why this way is not taken or None, the finding as text, what was measured); where there is a reason, no try."""
    if reason is None:
        try:
            found = _measure(policy, batch)
            worst, where = _gap(found, expected)
            if worst <= limit:
                return None, f"exact to {worst:.1e}", found
            reason = f"{where} differs by {worst:.1e} (relative)"
        except Exception as error:  # whatever an architecture raises, training goes on by the plain way
            reason = f"it raised {_said(error)}"
    return reason, f"off: {reason}", {}


def _gap(found: dict[str, mx.array], expected: dict[str, mx.array]) -> tuple[float, str]:
    """The largest difference in norm relative to its tensor's, and whose it is; NaN counts as infinite.

    A gradient a hundred times smaller than the largest one is measured against that size instead: it is rounding.
    """
    sizes = {name: _norm(value) for name, value in expected.items()}
    steepest = max((size for name, size in sizes.items() if name != "log-probs"), default=0.0)
    worst, where = 0.0, "nothing"
    for name, size in sizes.items():
        gap = _norm(found[name].astype(mx.float32) - expected[name].astype(mx.float32))
        gap /= max(size, 1e-12 if name == "log-probs" else 1e-2 * steepest)
        gap = gap if math.isfinite(gap) else math.inf
        if gap > worst:
            worst, where = gap, name
    return worst, where


def _norm(x: mx.array) -> float:
    return float(np.linalg.norm(np.array(x.astype(mx.float32))))


def _said(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def _adapter_off(policy: Policy, batch: Batch) -> str:
    """With adapters off, moved adapters must not be seen at all."""
    if not adapter.adapters_of(policy.model):
        return "no adapter"
    with policy.adapter_off():
        before = policy.model(batch.prompt[:1])
        mx.eval(before)
        with nudged(policy.model):
            after = policy.model(batch.prompt[:1])
            mx.eval(after)
    if not mx.array_equal(before, after):
        raise RuntimeError("the adapter still acts when it is off; the reference would be wrong")
    return "exact"
