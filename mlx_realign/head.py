# SPDX-License-Identifier: Apache-2.0
"""Finds a model's head without knowing its architecture, and takes it off.

The head is the module outside the blocks whose output the model ends with: a linear layer, or an embedding through
`as_linear`. Its class is swapped for a tapped subclass (parameter paths stay): the tap can hand out the hidden states
that reach the head, or let hidden states of ours in. Whatever the model does to logits after the head (scaling, soft
caps) is kept by running the model's own code around the tap. A model that multiplies by its embedding's weight itself
has no such module: then the logits stand in for the hidden states, and the head does nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import balance, calls
from .forward import layers_of
from .kernels.token_scores import Head, Weight

PROBE = mx.array([[1, 2, 3]])
PLAIN = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)


class Tap:
    """What the tapped head does when it is called: nothing, catch what comes in, or compute from something else."""

    def __init__(self) -> None:
        self.mode, self.hidden = "off", None

    def __call__(self, compute: Any, x: mx.array) -> mx.array:
        if self.mode == "catch":
            self.hidden = x
            return x[..., :1]  # logits nobody looks at: the head itself never runs
        return compute(self.hidden if self.mode == "inject" else x)

    @contextmanager
    def set(self, mode: str, hidden: mx.array | None = None) -> Iterator["Tap"]:
        self.mode, self.hidden = mode, hidden
        try:
            yield self
        finally:
            self.mode, self.hidden = "off", None


class Body:
    """The model without its head. whole: the head stays on, and what is called hidden states are logits."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.tap = model, Tap()
        self.module, self.method = _tapped_head(model, self.tap)
        self.whole = self.module is None
        logits = model(PROBE)
        mx.eval(logits)
        self.vocabulary = logits.shape[-1]
        self.bare = self.module is not None and self._is_bare(self.module, logits)

    def hidden(self, tokens: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Hidden states [rows, columns, D] that the head would get; tokens int32 [rows, columns]."""
        if self.whole:
            return self.model(tokens, cache=cache)
        with self.tap.set("catch") as tap:
            self.model(tokens, cache=cache)
            if tap.hidden is None:
                raise RuntimeError("the model did not call its head")
            return tap.hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """Logits [n, V] of hidden states [n, D], with all that the model does to them after the head."""
        if self.whole:
            return hidden
        if self.bare:
            return getattr(self.module, self.method)(hidden)
        with balance.listening(), self.tap.set("inject", hidden[None]):  # the probe's routers have nothing to say
            return self.model(PROBE[:, :1])[0]  # lazily: only what stands after the tap is ever computed

    def head(self) -> Head:
        """The head as kernels want it. Its weight is given where logits are hidden @ weight.T and nothing else."""
        module = self.module
        if self.whole or module is None:
            return Head(self.logits, self.vocabulary)
        if module.trainable_parameters():
            return Head(self.logits, self.vocabulary, None, module)
        plain = type(module).__mro__[1] in PLAIN and "bias" not in module and self.bare
        return Head(self.logits, self.vocabulary, _weight(module) if plain else None)

    def _is_bare(self, module: nn.Module, logits: mx.array) -> bool:
        raw = getattr(module, self.method)(self.hidden(PROBE))
        # Bit for bit: the same arithmetic twice. A soft cap is all but the identity where logits are small.
        return raw.shape == logits.shape and bool(mx.array_equal(raw, logits))


def _weight(module: nn.Module) -> Weight:
    names = ("weight", "scales", "biases") if "scales" in module else ("weight",)
    options = {k: getattr(module, k) for k in ("group_size", "bits", "mode")} if "scales" in module else {}
    return Weight({name: module[name] for name in names if name in module}, options)


def _tapped_head(model: nn.Module, tap: Tap) -> tuple[nn.Module | None, str]:
    """Tap every candidate, run a probe, keep the tap on the one that was called last."""
    inside = {id(m) for layer in layers_of(model) for m in layer.modules()}
    candidates = [m for _, m in model.named_modules() if id(m) not in inside and _is_candidate(m)]
    # The base inside an adapter layer is called after it, and would pass for the head without its adapter.
    wrapped = {id(inner) for m in candidates for inner in m.modules() if inner is not m}
    called: list[nn.Module] = []
    bases: dict[int, type] = {}
    for module in candidates:
        bases[id(module)] = _untapped(type(module))
        module.__class__ = bases[id(module)]
    outer = [m for m in candidates if id(m) not in wrapped]
    for module in outer:
        module.__class__ = _tapped(bases[id(module)], lambda compute, x, m=module: (called.append(m), compute(x))[1])
    model(PROBE)
    for module in outer:
        module.__class__ = bases[id(module)]
    if not called:
        return None, ""
    module = called[-1]
    module.__class__ = _tapped(bases[id(module)], tap)
    return module, "as_linear" if hasattr(module, "as_linear") else "__call__"


def _is_candidate(module: nn.Module) -> bool:
    return (
        hasattr(module, "as_linear")
        or (hasattr(module, "weight") and hasattr(module, "to_quantized"))
        or (hasattr(module, "linear") or isinstance(module, nn.QuantizedLinear))
    )


def _untapped(kind: type) -> type:
    return getattr(kind, "tapped_from", kind)


def _tapped(base: type, tap: Any) -> type:
    method = "as_linear" if hasattr(base, "as_linear") else "__call__"
    original = getattr(base, method)

    def call(self: Any, *args: Any, **kwargs: Any) -> mx.array:
        def compute(h: mx.array) -> mx.array:
            given, named = calls.with_first(base, h, args, kwargs, method)
            return original(self, *given, **named)

        return tap(compute, calls.first(base, args, kwargs, method))

    return type(base.__name__, (base,), {"tapped_from": base, method: call})
