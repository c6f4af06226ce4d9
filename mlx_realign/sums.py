# SPDX-License-Identifier: Apache-2.0
"""Sums over the micro-batches of a window, divided once at its end."""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from .batch import LossOutput


class Window:
    """What the micro-batches of an optimizer step give, summed. The device computes one while the next is made."""

    def __init__(self) -> None:
        self.out: LossOutput | None = None
        self.grads: dict[str, Any] = {}

    def add(self, out: LossOutput, grads: dict[str, Any]) -> None:
        """Begin to compute one more, as `Policy.gradients` gives it with wait=False. Waits for the one before.

        So there is never more than one under way: two would take the memory of two.
        """
        if self.out is not None:
            mx.eval(self.out, self.grads)
            out, grads = add(self.out, out), tree_map(lambda x, y: x + y, self.grads, grads)
        self.out, self.grads = out, grads
        mx.async_eval(out, grads)

    def take(self) -> tuple[LossOutput, dict[str, Any]]:
        """(the losses, the gradients), which are not held here any more."""
        assert self.out is not None
        grads, self.grads = self.grads, {}
        return self.out, grads


def add(a: LossOutput, b: LossOutput) -> LossOutput:
    """Their sum; a metric that one of them lacks is the other's."""
    metrics = {**a.metrics, **b.metrics}
    for name in a.metrics.keys() & b.metrics.keys():
        (total, count), (more, units) = a.metrics[name], b.metrics[name]
        metrics[name] = (total + more, count + units)
    return LossOutput(a.total + b.total, a.count + b.count, metrics)


def averages(out: LossOutput, **scalars: mx.array) -> dict[str, float]:
    """The scalars and the metrics of a window, sums over counts, as numbers: the device is asked once.

    Also the margin of two means where no pair gives one.
    """
    asked = scalars | {name: total / mx.maximum(count, 1.0) for name, (total, count) in out.metrics.items()}
    values = np.array(mx.stack([x.astype(mx.float32).reshape(()) for x in asked.values()])) if asked else []
    found = {name: float(x) for name, x in zip(asked, values, strict=True)}
    if "rewards/chosen" in found:
        found.setdefault("rewards/margins", found["rewards/chosen"] - found["rewards/rejected"])
    return found


def number_of(scalar: mx.array) -> float:
    """A scalar array as a Python number."""
    value: Any = scalar.item()
    return float(value)
