# SPDX-License-Identifier: Apache-2.0
"""The gradient as a compiled step: one trace for each loss and each set of shapes, up to a number; then without."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from . import forward, taps
from .batch import Batch, LossOutput
from .kernels.experts import LOOKS

Differentiate = Callable[[Batch, Any], tuple[LossOutput, dict[str, Any]]]

NOTE = "steps are not compiled: this model looks at its numbers while it computes (which experts a token takes, say)"


MOST = 64  # traces of a loss: they are never given back, and hold buffers of which a GPU has so many


class LooksAtNumbers(Exception):
    """A trace has no numbers, and the model asks for some."""


def traceable(model: nn.Module, run: Callable[[mx.array], Any], tokens: mx.array) -> bool:
    """Whether `run` of token ids int32 [1, T] can be traced. Nothing is computed, and the model stays as it was."""
    state = [model.state]
    try:
        with forward.restored(model):
            mx.compile(run, inputs=state, outputs=state)(tokens)
    except (ValueError, RuntimeError) as error:
        if LOOKS in str(error):
            return False
        raise
    return True


class Gradient:
    """`differentiate` of a model, compiled."""

    def __init__(self, model: nn.Module, differentiate: Differentiate) -> None:
        self.model, self.differentiate = model, differentiate
        self.traces: dict[Any, Any] = {}

    @property
    def count(self) -> int:
        """Number of traces."""
        return sum(len(shapes) for _, _, shapes in self.traces.values())

    def __call__(self, batch: Batch, loss: Any) -> tuple[LossOutput, dict[str, Any]]:
        """As `differentiate`. Raises LooksAtNumbers, the model as it was, where it cannot be traced."""
        if loss not in self.traces:
            state = [self.model.state]  # also an output: checkpointed layers exchange parameters while they run
            forms: dict[tuple[str, ...], Any] = {}
            run = partial(self._packed, loss=loss, forms=forms)
            self.traces[loss] = mx.compile(run, inputs=state, outputs=state), forms, set()
        run, forms, traced = self.traces[loss]
        arrays: Any = [*tree_flatten(batch), *tree_flatten(taps.held(self.model))]
        shapes = tuple(x.shape for _, x in arrays if isinstance(x, mx.array))
        if shapes not in traced and len(traced) >= MOST:
            return self.differentiate(batch, loss)
        try:
            with nullcontext() if shapes in traced else forward.restored(self.model):
                packed, grads = run(batch)
        except (ValueError, RuntimeError) as error:
            if LOOKS in str(error):
                raise LooksAtNumbers from error
            raise
        traced.add(shapes)
        return tree_map(lambda i: packed[i], forms[tuple(sorted(batch.extras))]), grads

    def _packed(self, batch: Batch, loss: Any, forms: dict[tuple[str, ...], Any]) -> tuple[mx.array, dict[str, Any]]:
        """As `differentiate`, the scalars in one array: MLX does not compile two outputs that are the same expression.

        forms: takes down, by the batch's extras, the tree of places in that array.
        """
        out, grads = self.differentiate(batch, loss)
        leaves: list[mx.array] = []
        forms[tuple(sorted(batch.extras))] = tree_map(lambda x: (leaves.append(x), len(leaves) - 1)[1], out)
        return mx.stack([x.astype(mx.float32) for x in leaves]), grads
