# SPDX-License-Identifier: Apache-2.0
"""Proof, on the very model that was loaded, that the fast ways give what the plain ones do; what does not is not used.

A tiny random batch with unequal pads, several completions per prompt and prompts longer than the (shrunk) attention
window goes through, and log-probs and gradients are held against those of mlx-lm's own functions, one unpadded row at a
time: our kernels, the chunked head, shared prompts, checkpointed layers. Adapters off are held against their base.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from . import adapter, compiled, data, forward, noise, selfcheck_reference
from .batch import Batch, Completion, Example, LossOutput, Scores, placed, taken
from .errors import UserError, said
from .forward import STOPS, shrunk_windows
from .policy import Policy
from .selfcheck_reference import nudged, weights_of

# Relative, of a tensor's norm. On SmolLM2-135M rounding comes to 1e-4 in float32 (also over a 4-bit base), to 5e-2 in
# bfloat16, and to 7e-2 there on the worst of mlx-lm's architectures; keys that get no gradient, positions off by one or
# a pad token that is seen come to more than 1 in both. Products rounded to 10 bits (1.6e-2) are judged as float16's.
LIMIT = {mx.float32: 2e-3, mx.bfloat16: 1.5e-1, mx.float16: 5e-2}


class Checks(NamedTuple):
    """What was found: numbers for config.json, sentences for the user."""

    results: dict[str, str]
    notes: list[str]


def run(policy: Policy) -> Checks:
    """Check a policy and set its ways accordingly. Nothing of the model is changed.

    Raises UserError where the model's own forward pass cannot be differentiated: then there is nothing to train.
    """
    batch, limit = probe(policy.vocabulary), LIMIT[noise.judged_as(policy.dtype)]
    checkpointed = any(getattr(layer, "recomputed", False) for layer in forward.layers_of(policy.model))
    forward.uncheckpoint_layers(policy.model)
    with shrunk_windows(policy.model), _logps_alone(policy):
        policy.body.whole, policy.sharing, policy.even = True, False, False
        policy.kernels.on = not policy.kernels.closed
        expected, untold = selfcheck_reference.by_mlx_lm(policy, batch)
        check = _Check(policy, batch, expected, limit, {}, [untold] if untold else [])
        check.kernels()
        check.head()
        check.prompts()
        if checkpointed:
            check.checkpointing()
        check.results["adapter_off"] = _adapter_off(policy, batch)
    if policy.compiled and not compiled.traceable(policy.model, policy.body.hidden, batch.prompt[:1]):
        policy.compiled = False
        check.notes.append(compiled.NOTE)
    return Checks(check.results, check.notes)


@dataclass
class _Check:
    policy: Policy
    batch: Batch
    expected: dict[str, mx.array]  # what mlx-lm's own functions give
    limit: float
    results: dict[str, str]
    notes: list[str]

    def kernels(self) -> None:
        """Rows side by side with our kernels, or else with mlx-lm's."""
        policy = self.policy
        reason, found = self._try("kernels")
        if reason and policy.kernels.on:
            policy.kernels.on = False
            still, found = self._try("rows")
            if not still:
                self.notes.append(f"our kernels are off, mlx-lm's own functions run instead: {reason}")
            else:  # they are not to blame
                policy.kernels.on, reason = True, still
        if reason and not found:
            if reason.startswith((STOPS, "log-probs")) or noise.judged_as(policy.dtype) == mx.float32:
                raise selfcheck_reference.refused(policy, f"rows of a batch are not what mlx-lm gives: {reason}")
            self.notes.append(f"rows of a batch are not quite what mlx-lm gives for each alone: {reason}")
        self.expected = found | self.expected  # gradients of this way stand in where mlx-lm's take too long

    def head(self) -> None:
        body = self.policy.body
        body.whole = body.module is None
        reason = "the model has no layer of its own for it" if body.whole else None
        reason, _ = self._try("chunked_head", reason)
        if reason:
            body.whole = True
            self.notes.append(f"the head is not cut into chunks, which takes more memory: {reason}")

    def prompts(self) -> None:
        policy, padded = self.policy, forward.shareable(self.policy.model, padded=True)
        policy.sharing, policy.even = able, _ = policy.shares()
        reason, _ = self._try("shared_prompts", None if able else forward.shareable(policy.model, padded=False))
        # What raises may do so at other shapes only.
        if reason and able and not policy.even and not reason.startswith(STOPS):
            policy.even, padded = True, reason
            if reason := self._try("shared_prompts")[0] and padded:
                self.results["shared_prompts"] = f"off: {reason}"
        if reason:
            policy.sharing = policy.even = False
            self.notes.append(f"prompts are not shared between completions, each row is computed alone: {reason}")
        elif policy.even and not policy.exact:
            self.notes.append(
                f"only prompts of one length are computed together, which takes more time: with padding {padded}"
            )

    def checkpointing(self) -> None:
        forward.checkpoint_layers(self.policy.model)
        reason, _ = self._try("checkpointed_layers")
        if not reason and not forward.recomputing(self.policy.model):
            kind = self.policy.config.get("model_type")
            reason = f"{kind} models compute with the parts of their layers, not with them"
            self.results["checkpointed_layers"] = f"off: {reason}"
        if reason:
            forward.uncheckpoint_layers(self.policy.model)
            self.notes.append(f"gradient checkpointing is off: {reason}")

    def _try(self, name: str, reason: str | None = None) -> tuple[str | None, dict[str, mx.array]]:
        """(why this way is not taken or None, what was measured where it is); where there is a reason, no try."""
        if reason is None:
            try:
                found = _measure(self.policy, self.batch)
                worst, where = _gap(found, self.expected)
                if worst <= self.limit:
                    self.results[name] = f"exact to {worst:.1e}"
                    return None, found
                reason = _difference(where, worst)
            except Exception as error:  # whatever an architecture raises, training goes on by the plain way
                reason = f"{STOPS} ({said(error)})"
        self.results[name] = f"off: {reason}"
        return reason, {}


@contextmanager
def _logps_alone(policy: Policy) -> Iterator[None]:
    """Inside, the load-balancing loss is left out: it is a matter of a whole batch, not a sum over its rows."""
    kept, policy.balance = policy.balance, None
    try:
        yield
    finally:
        policy.balance = kept


def probe(vocabulary: int) -> Batch:
    """Prompts of 7, 5 and 7 tokens with 2, 1 and 1 completions of unequal length; small: every start pays for it."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.integers(3, max(4, vocabulary - 1), shape, dtype=np.int32)  # noqa: E731
    pad, rows = np.array([0, 2, 0], np.int32), np.array([0, 0, 1, 2], np.int32)
    prompt = np.where(np.arange(7)[None] >= pad[:, None], draw(3, 7), 0)
    mask = np.arange(5)[None] < np.array([5, 3, 4, 2])[:, None]
    arrays: Any = (prompt, pad, np.where(mask, draw(4, 5), 0), rows, mask, np.flatnonzero(mask).astype(np.int32))
    return Batch(*map(mx.array, arrays), extras={})


def _measure(policy: Policy, batch: Batch) -> dict[str, mx.array]:
    """Log-probs and gradients of a weighted sum of them; adapters start at zero, so theirs are nudged for the check.

    Where runs lay their rows out exactly, so are the probe's.
    """
    batch.extras["weights"] = weights_of(batch)

    def loss(scores: Scores, part: Batch) -> LossOutput:
        total = (scores.logps * part.extras["weights"]).sum()
        return LossOutput(total, mx.array(1.0), {"logps": (scores.logps, mx.array(1.0))})

    exact = policy.exact
    parts = [_exact(batch, p, policy.sharing) for p in range(batch.prompt.shape[0])] if exact else [batch]
    logps, grads = [], {}
    with nudged(policy.model):
        for part in parts:
            if policy.trained:
                out, slopes = policy.differentiate(part, loss)
                grads = tree_map(mx.add, grads, slopes) if grads else slopes
            else:
                out = loss(policy.scores(part), part)
            mx.eval(out, grads)
            logps.append(out.metrics["logps"][0])
    found = logps[0]
    if exact:
        own = [row for part, x in zip(parts, logps, strict=True) for row in taken(part, x, np.array(part.mask).sum(1))]
        found = mx.array(np.stack([np.pad(row, (0, batch.mask.shape[1] - len(row))) for row in own]))
    slopes: Any = tree_flatten(grads)
    return {"log-probs": found, **{f"the gradient of {k}": v for k, v in slopes}}


def set_packing(policy: Policy, *, on: bool) -> None:
    """Have the policy pack its rows, or not. UserError where packed rows of this model are not what each is alone."""
    policy.packing = False
    if not on:
        return
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(3, max(4, policy.vocabulary - 1), n).astype(np.int32)  # noqa: E731
    rows = [Example(draw(3), (Completion(draw(n), np.ones(n, bool)),), 0, "", {}) for n in (5, 9, 2, 7)]
    batch, found = data.collate_exact(rows, 0), []
    why = "some layers sum up all tokens in a state" if policy.stateful else forward.by_length(policy.model)
    try:
        with shrunk_windows(policy.model):
            for policy.packing in () if why else (False, True):
                found.append(np.array(policy.token_logps(batch)))
        gap = float(np.abs(found[0] - found[1]).max()) if found else 0.0
        if not gap <= LIMIT[noise.judged_as(policy.dtype)]:
            why = f"log-probs of packed rows differ by {gap:.1e} nats"
    except Exception as error:  # whatever an architecture raises
        why = said(error)
    if why:
        policy.packing = False
        kind = policy.config.get("model_type")
        raise UserError(f"--pack: {kind} models cannot be trained on packed rows ({why}): leave it out")


def _exact(batch: Batch, prompt: int, sharing: bool) -> Batch:
    """A prompt of the probe with its completions as a run on a GPU lays them out: not all of its tokens are shared."""
    rows = np.flatnonzero(np.array(batch.row_prompt) == prompt)
    tokens, mask, weights = (np.array(x)[rows] for x in (batch.completion, batch.mask, batch.extras["weights"]))
    own = [row[kept] for row, kept in zip(tokens, mask, strict=True)]
    text = np.array(batch.prompt)[prompt, int(np.array(batch.pad)[prompt]) :]
    completions = tuple(Completion(one, np.ones(len(one), bool)) for one in own)
    prefix = len(text) - 3 if sharing else 0
    lengths = sorted(len(text) - 1 - prefix + len(one) for one in own)
    widths = (lengths[len(own) // 2 - 1], lengths[-1]) if len(own) > 1 else (lengths[-1],)
    part = data.collate_exact([Example(text, completions, 0, "", {})], prefix, widths)
    part.extras["weights"] = placed(part, [row[kept] for row, kept in zip(weights, mask, strict=True)])
    return part


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


def _difference(where: str, gap: float) -> str:
    verb, be = ("differ", "are") if where == "log-probs" else ("differs", "is")
    return f"{where} {verb} by {gap:.1e} (relative)" if math.isfinite(gap) else f"{where} {be} not finite"


def _norm(x: mx.array) -> float:
    return float(np.linalg.norm(np.array(x.astype(mx.float32))))


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
