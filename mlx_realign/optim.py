# SPDX-License-Identifier: Apache-2.0
"""Optimizers of mlx.optimizers by name, the learning rate as a function of the step, and the global gradient norm."""

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from .config import TrainSettings


def make(settings: TrainSettings) -> optim.Optimizer:
    """The optimizer; Adam and AdamW with bias correction, which MLX leaves off and every published recipe has on."""
    decay = settings.weight_decay
    match settings.optimizer:
        case "adamw":
            return _adamw(decay)
        case "adam":
            return optim.Adam(learning_rate=0.0, bias_correction=True)
        case "sgd":
            return optim.SGD(learning_rate=0.0, weight_decay=decay)
        case "lion":
            return optim.Lion(learning_rate=0.0, weight_decay=decay)
        case "adafactor":
            return optim.Adafactor(learning_rate=0.0, relative_step=False, scale_parameter=False, weight_decay=decay)
        case "muon":  # its orthogonalised update is for matrices; vectors and embeddings take AdamW
            muon = optim.Muon(learning_rate=0.0, weight_decay=decay)
            return optim.MultiOptimizer([muon, _adamw(decay)], [lambda path, x: x.ndim == 2 and "embed" not in path])
    raise ValueError(settings.optimizer)


def set_learning_rate(optimizer: optim.Optimizer, rate: float) -> None:
    """For the next update, of every part of the optimizer."""
    for part in getattr(optimizer, "optimizers", [optimizer]):
        part.learning_rate = rate


def learning_rate(settings: TrainSettings, peak: float, step: int, steps: int) -> float:
    """Of optimizer step `step` (from 1) of `steps`: a linear rise over the warm-up, then the schedule."""
    if step <= settings.warmup_steps:
        return peak * step / settings.warmup_steps
    share = (step - 1 - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    match settings.lr_schedule:
        case "linear":
            return peak * (1 - share)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * share))
    return peak


def clip(grads: dict[str, Any], limit: float) -> tuple[dict[str, Any], mx.array]:
    """Gradients scaled so that their global norm is at most `limit` (0: as they are), and the norm before, float32."""
    norm = mx.sqrt(sum((mx.square(g.astype(mx.float32)).sum() for _, g in tree_flatten(grads)), mx.array(0.0)))
    if not limit:
        return grads, norm
    scale = mx.minimum(limit / (norm + 1e-6), 1.0)
    return tree_map(lambda g: g * scale.astype(g.dtype), grads), norm


def _adamw(decay: float) -> optim.Optimizer:
    return optim.AdamW(learning_rate=0.0, weight_decay=decay, bias_correction=True)
