# SPDX-License-Identifier: Apache-2.0
"""Optimizers of mlx.optimizers by name, the learning rate as a function of the step, the global gradient norm.

An adapter is hundreds of small matrices, and a dozen tiny operations on each would cost more than the arithmetic in
them. Rules that work entry by entry (Adam, AdamW, SGD, Lion) get all small tensors as one vector.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from .config import TrainSettings

SMALL = 1 << 18  # entries; a larger tensor is worth its own operations, and packing it would cost a copy of it
ENTRYWISE = ("adamw", "adam", "sgd", "lion")

Tree = dict[str, Any]


class Updater:
    """The optimizer of a run, its state included."""

    def __init__(self, settings: TrainSettings, parameters: Tree) -> None:
        self.limit = settings.max_grad_norm
        self.small = SMALL if settings.optimizer in ENTRYWISE else 0
        self.rule = make(settings)
        # The model's tensors are views of these once a step was made: packing them again would copy all of them.
        self.values: dict[str, mx.array] = {}
        self.views: dict[str, mx.array] = {}
        self.rule.init(self.pack(parameters))
        mx.eval(self.rule.state)

    def clip(self, grads: Tree, count: mx.array) -> tuple[dict[str, mx.array], mx.array]:
        """grads / count with its global norm clipped, packed; and that norm before, float32. Nothing is computed yet.

        grads: tree of sums over the window; count: float32 scalar, units in the window.
        """
        packed = self.pack(grads)
        norm = mx.sqrt(mx.stack([mx.square(g.astype(mx.float32)).sum() for g in packed.values()]).sum()) / count
        scale = (mx.minimum(self.limit / (norm + 1e-6), 1.0) if self.limit else 1.0) / count
        return {name: g * scale.astype(g.dtype) for name, g in packed.items()}, norm

    def update(self, model: nn.Module, packed: dict[str, mx.array], rate: float) -> None:
        """Move the trainable parameters of `model` by clipped gradients, at this learning rate; begun, not awaited."""
        for part in getattr(self.rule, "optimizers", [self.rule]):
            part.learning_rate = rate
        like = flat(model.trainable_parameters())
        known = self.views.keys() == like.keys() and all(like[path] is view for path, view in self.views.items())
        new = self.rule.apply_gradients(packed, self.values if known else self.pack(like))
        self.values, self.views = new, self.unpack(new, like)
        model.update(tree_unflatten(list(self.views.items())))
        del like, new, packed  # so that the new values may take the memory of the old ones
        mx.async_eval(self.values, self.rule.state, self.views)

    def pack(self, tree: Tree) -> dict[str, mx.array]:
        """Small tensors as one vector per dtype, others as they are; names without dots, which would nest them."""
        whole: dict[str, mx.array] = {}
        small: dict[str, list[mx.array]] = {}
        for path, value in flat(tree).items():
            if value.size < self.small:
                small.setdefault(_name(value), []).append(value.reshape(-1))
            else:
                whole[path.replace(".", "/")] = value
        return whole | {name: mx.concatenate(parts) for name, parts in small.items()}

    def unpack(self, packed: dict[str, mx.array], like: dict[str, mx.array]) -> dict[str, mx.array]:
        """The inverse of `pack`: tensors by path, of the shapes and in the order of `like`."""
        taken: dict[str, int] = {}
        found: dict[str, mx.array] = {}
        for path, value in like.items():
            if value.size < self.small:
                name = _name(value)
                start = taken.get(name, 0)
                taken[name] = start + value.size
                found[path] = packed[name][start : start + value.size].reshape(value.shape)
            else:
                found[path] = packed[path.replace(".", "/")]
        return found

    def state(self) -> dict[str, mx.array]:
        """The optimizer's arrays by name: moments, step and learning rate."""
        return {name: value for name, value in flat(self.rule.state).items() if isinstance(value, mx.array)}

    def restore(self, saved: dict[str, mx.array]) -> None:
        """Put the arrays of `state` back. KeyError where one is missing."""
        self.rule.state = tree_map_with_path(lambda name, _: saved[name], self.rule.state)
        mx.eval(self.rule.state)


def flat(tree: Any) -> dict[str, mx.array]:
    """Path -> array of a tree's leaves, in the tree's order."""
    return dict(tree_flatten(tree))  # type: ignore[arg-type]  # typed as a list or a dict; without options it is a list


def make(settings: TrainSettings) -> optim.Optimizer:
    """The rule; Adam and AdamW with bias correction, which MLX leaves off and every published recipe has on."""
    decay = settings.weight_decay
    match settings.optimizer:
        case "adamw":
            return _adamw(decay)
        case "adam":
            return _adamw(0.0)
        case "sgd":
            return optim.SGD(learning_rate=0.0, weight_decay=decay)
        case "lion":
            return optim.Lion(learning_rate=0.0, weight_decay=decay)
        case "adafactor":
            return optim.Adafactor(learning_rate=0.0, relative_step=False, scale_parameter=False, weight_decay=decay)
        case "muon":  # its orthogonalised update is for hidden matrices; vectors, embeddings and heads take AdamW
            muon = optim.Muon(learning_rate=0.0, weight_decay=decay)
            return optim.MultiOptimizer([muon, _adamw(decay)], [_is_hidden_matrix])
    raise ValueError(settings.optimizer)


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


def _adamw(decay: float) -> optim.Optimizer:
    if not decay:  # AdamW would still make a pass over all parameters, to multiply them by 1
        return optim.Adam(learning_rate=0.0, bias_correction=True)
    return optim.AdamW(learning_rate=0.0, weight_decay=decay, bias_correction=True)


def _name(value: mx.array) -> str:
    """Of the vector that a small tensor belongs to: its dtype."""
    return str(value.dtype).rpartition(".")[2]


def _is_hidden_matrix(path: str, value: mx.array) -> bool:
    return value.ndim == 2 and "embed" not in path and "lm_head" not in path
