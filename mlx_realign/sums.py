# SPDX-License-Identifier: Apache-2.0
"""Sums over the micro-batches of a window, divided once at its end."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from .batch import LossOutput


def add(a: Any, b: Any) -> Any:
    """Element-wise sum of equal trees, evaluated so that graphs of micro-batches do not pile up."""
    total = tree_map(lambda x, y: x + y, a, b)
    mx.eval(total)
    return total


def averages(out: LossOutput) -> dict[str, float]:
    """Metrics of a window: sums over counts; the margin of two means where no pair gives one."""
    found = {name: number_of(total / mx.maximum(count, 1.0)) for name, (total, count) in out.metrics.items()}
    if "rewards/chosen" in found:
        found.setdefault("rewards/margins", found["rewards/chosen"] - found["rewards/rejected"])
    return found


def number_of(scalar: mx.array) -> float:
    """A scalar array as a Python number."""
    value: Any = scalar.item()
    return float(value)
