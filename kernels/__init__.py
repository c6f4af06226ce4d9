# SPDX-License-Identifier: Apache-2.0
"""Imported as `mlx_realign.kernels`. Each file: reference(), fused() with a gradient of its own, available().

`install` puts the fused forms of functions that mlx-lm's models call in their place, after a check on this device.
"""

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import mlx.core as mx

from . import attention, swiglu

TOLERANCE = 1e-5  # relative to the largest entry, values and gradients, float32


def install(model: Any) -> list[str]:
    """Use the fused kernels in the modules this model is made of, where they prove right; says where they do not.

    They are exchanged by name in mlx-lm's model modules, for the whole process: same results, less time.
    """
    notes = []
    for name, make in (("swiglu", _swiglu), ("scaled_dot_product_attention", _attention)):
        replacement, trouble = make()
        if trouble:
            notes.append(f"kernel {name}: {trouble}; the reference is used")
        for module in {sys.modules[type(m).__module__] for _, m in model.named_modules()} if replacement else ():
            if module.__name__.startswith("mlx_lm.") and hasattr(module, name):
                setattr(module, name, replacement)
    return notes


@cache
def _swiglu() -> tuple[Callable[..., mx.array] | None, str | None]:
    if not swiglu.available():
        return None, None
    shapes = ((5, 33), (5, 33))
    return (None, trouble) if (trouble := _differs(swiglu.fused, swiglu.reference, shapes)) else (swiglu.fused, None)


@cache
def _attention() -> tuple[Callable[..., mx.array], str | None]:
    """Rows that share a prompt bring their own attention, so mlx-lm's is exchanged on every device."""
    if not attention.available():
        return partial(_as_mlx_lm_calls_it, otherwise=None), None
    shapes = ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8))
    options = {"scale": 0.3, "mask": mx.arange(2, 7)[:, None] >= mx.arange(7)}
    bind = lambda f: lambda *arrays: f(*arrays, **options)  # noqa: E731
    trouble = _differs(bind(attention.fused), bind(attention.reference), shapes)
    return partial(_as_mlx_lm_calls_it, otherwise=None if trouble else attention.fused), trouble


def _as_mlx_lm_calls_it(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
    *,
    otherwise: Callable[..., mx.array] | None,
) -> mx.array:
    if attend := getattr(cache, "attend", None) or getattr(keys, "attend", None):  # keys of a layer that lends them
        return attend(queries, scale=scale, mask=mask, sinks=sinks)
    if otherwise is None or hasattr(cache, "bits"):  # a quantised cache holds tuples
        from mlx_lm.models.base import scaled_dot_product_attention

        return scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    return otherwise(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def _differs(fused: Callable[..., mx.array], reference: Callable[..., mx.array], shapes: Any) -> str | None:
    """What is wrong with a kernel on this device, or None: values and gradients against the reference."""
    arrays = [3 * mx.random.normal(shape, key=mx.random.key(i)) for i, shape in enumerate(shapes)]
    weight = mx.random.normal(reference(*arrays).shape, key=mx.random.key(9))
    try:
        for f, g in zip(_values(fused, arrays, weight), _values(reference, arrays, weight), strict=True):
            error = (mx.abs(f - g).max() / mx.abs(g).max()).item()
            if not error <= TOLERANCE:
                return f"differs from its reference by {error:.1e}"
    except Exception as error:  # a kernel that cannot run here must not stop training
        return f"failed ({error})"
    return None


def _values(function: Callable[..., mx.array], arrays: list[mx.array], weight: mx.array) -> list[mx.array]:
    gradient = mx.grad(lambda *a: (function(*a) * weight).sum(), argnums=tuple(range(len(arrays))))
    return [function(*arrays), *gradient(*arrays)]
