# SPDX-License-Identifier: Apache-2.0
"""What the self-check holds everything against: mlx-lm's own functions, one unpadded row at a time.

Nothing that training does its own way takes part: no kernel of ours, no gradient by hand, no padding and so no mask of
pads, no shared prompt, no chunk of the head, no layer recomputed. The model is in training mode, in which mlx-lm's
layers leave their kernels without a gradient aside; dropout does not act.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from . import adapter
from .adapter_layers import Adapter
from .batch import Batch
from .errors import UserError, said
from .policy import Policy
from .unsupported import explained

SECONDS = 10.0  # gradients that would take longer are left out
DROPOUT = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


def by_mlx_lm(policy: Policy, batch: Batch) -> tuple[dict[str, mx.array], str | None]:
    """Log-probs float32 [R, Lc] and the gradient of their sum weighted by `weights_of`; a line where there is none.

    A row at a time, so in no more memory than a training step. Raises UserError where it fails or is not finite.
    """
    try:
        with nudged(policy.model), _training(policy.model), _stock(policy):
            logps, grads, seconds = _rows(policy, batch)
    except Exception as error:  # whatever an architecture raises, the user gets one line
        raise refused(policy, said(error)) from error
    if not mx.isfinite(logps).all():
        dtype = str(policy.dtype).rpartition(".")[2]
        raise UserError(f"--model {policy.name}: its log-probs are not finite in {dtype}; check it, or set --dtype")
    slopes: Any = tree_flatten(grads)
    found = {"log-probs": logps, **{f"the gradient of {name}": value for name, value in slopes}}
    long = f"gradients were not compared with mlx-lm's own, which would take {seconds:.0f} s; log-probs were"
    return found, long if policy.trained and not slopes else None


def weights_of(batch: Batch) -> mx.array:
    """float32 [R, Lc]: what each log-prob counts in the sum whose gradient is compared."""
    return mx.random.normal(batch.mask.shape, key=mx.random.key(1))


def refused(policy: Policy, reason: str) -> UserError:
    """What stops a run: this model cannot be trained."""
    kind = policy.config.get("model_type")
    return UserError(f"--model {policy.name}: {kind} models cannot be trained here: {explained(kind, reason)}")


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


def _rows(policy: Policy, batch: Batch) -> tuple[mx.array, dict[str, Any], float]:
    """Log-probs, the gradient summed over rows (nothing where it takes too long), and how long it took or would."""
    prompt, pad, completion, row_prompt, mask, weights = map(np.array, (*batch[:5], weights_of(batch)))
    logps, grads, seconds = np.zeros(mask.shape, np.float32), {}, 0.0
    gradients = policy.trained > 0
    for i, p in enumerate(row_prompt):
        own = completion[i][mask[i]]  # trained tokens come first in every row of the probe
        row = np.concatenate([prompt[p, pad[p] :], own])
        began = time.perf_counter()
        found, slopes = _row(policy, mx.array(row), len(own), mx.array(weights[i, : len(own)]), gradients)
        if gradients:
            grads = tree_map(mx.add, grads, slopes) if grads else slopes
        mx.eval(found, grads)
        logps[i, : len(own)] = np.array(found)
        if i == 0 and (seconds := (time.perf_counter() - began) * len(row_prompt)) > SECONDS:
            gradients, grads = False, {}
    return mx.array(logps), grads, seconds


def _row(
    policy: Policy, row: mx.array, length: int, weights: mx.array, gradient: bool
) -> tuple[mx.array, dict[str, Any]]:
    """Log-probs float32 [length] of the row's last tokens, and the gradient of their weighted sum."""

    def objective(parameters: dict[str, Any]) -> tuple[mx.array, mx.array]:
        policy.model.update(parameters)
        logits = policy.model(row[None, :-1])[0, -length:].astype(mx.float32) / policy.temperature
        every = logits - mx.logsumexp(logits, -1, keepdims=True)
        logps = mx.take_along_axis(every, row[-length:, None], 1)[:, 0]
        return (logps * weights).sum(), logps

    trainable = policy.model.trainable_parameters()
    try:
        if not gradient:
            return objective(trainable)[1], {}
        (_, logps), grads = mx.value_and_grad(objective)(trainable)
        return logps, grads
    finally:
        policy.model.update(trainable)  # tracers must not stay behind in the model


@contextmanager
def _stock(policy: Policy) -> Iterator[None]:
    """Inside, attention, activations and adapters are computed and differentiated by MLX and mlx-lm alone."""
    on, policy.kernels.on, Adapter.by_hand = policy.kernels.on, False, False
    try:
        yield
    finally:
        policy.kernels.on, Adapter.by_hand = on, True


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Inside, modules are in training mode, dropout apart."""
    before = [(module, module.training) for module in model.modules()]
    for module, _ in before:
        module._training = not isinstance(module, DROPOUT)
    try:
        yield
    finally:
        for module, mode in before:
            module._training = mode
