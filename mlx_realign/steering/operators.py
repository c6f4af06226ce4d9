# SPDX-License-Identifier: Apache-2.0
"""What steering does to the residual stream behind a block: pure functions of arrays, found by name.

h is [B, T, d] in the stream's dtype, `coefficient` float32 [B or 1, T or 1, 1]; vectors and unit vectors are float32
[B or 1, 1, d], numbers float32 [B or 1, 1, 1]. Dots and lengths are taken in float32, what comes back has h's dtype.
Where the coefficient is 0 h comes back bit for bit; where it is 1 an operator does what its paper says. In between,
`ablate`, `clamp`, `affine` and `angular` go that share of the way.
"""

import inspect
import math
from collections.abc import Callable

import mlx.core as mx

from ..errors import UserError
from ..flags import nearest


def add(h: mx.array, coefficient: mx.array, *, vector: mx.array) -> mx.array:
    """h + c v. CAA, arXiv:2312.06681."""
    return _where(coefficient, h + (coefficient * vector).astype(h.dtype), h)


def add_norm(h: mx.array, coefficient: mx.array, *, vector: mx.array) -> mx.array:
    """(h + c v) |h| / |h + c v|: states turn and keep their length (`normalize` of repeng)."""
    wide = h.astype(mx.float32)
    moved = wide + coefficient * vector
    kept = _length(wide) / mx.maximum(_length(moved), 1e-30)
    return _where(coefficient, (moved * kept).astype(h.dtype), h)


def ablate(h: mx.array, coefficient: mx.array, *, unit: mx.array) -> mx.array:
    """h - c (h.u) u. arXiv:2406.11717."""
    return _where(coefficient, h - (coefficient * along(h, unit) * unit).astype(h.dtype), h)


def ablate_add(h: mx.array, coefficient: mx.array, *, unit: mx.array, vector: mx.array) -> mx.array:
    """h - min(|c|, 1) (h.u) u + c v: beyond 1 more is added, and no more removed than there is."""
    removed = mx.minimum(mx.abs(coefficient), 1.0) * along(h, unit) * unit
    return _where(coefficient, h + (coefficient * vector - removed).astype(h.dtype), h)


def clamp(h: mx.array, coefficient: mx.array, *, unit: mx.array, low: mx.array, high: mx.array) -> mx.array:
    """h + c (clip(h.u, low, high) - h.u) u; bounds in units of the residual stream."""
    now = along(h, unit)
    goal = mx.minimum(mx.maximum(now, low), high)
    return _where(coefficient, h + (coefficient * (goal - now) * unit).astype(h.dtype), h)


def affine(h: mx.array, coefficient: mx.array, *, unit: mx.array, target: mx.array) -> mx.array:
    """h + c (target - h.u) u: the component goes to where the baseline's mean has it. ACE, arXiv:2411.09003."""
    return _where(coefficient, h + (coefficient * (target - along(h, unit)) * unit).astype(h.dtype), h)


def angular(
    h: mx.array,
    coefficient: mx.array,
    *,
    unit: mx.array,
    second: mx.array,
    angle: mx.array,
    adaptive: mx.array,
) -> mx.array:
    """Turns what h has in the plane of two orthogonal units to `angle` (radians from `unit`), its length kept.

    Angular Steering, arXiv:2510.26243: h - P h + |P h| (cos a b1 + sin a b2). A coefficient c in between goes the share
    c of the shorter way round. adaptive: 1 turns only states with h.b1 > 0, 0 all of them.
    """
    x, y = along(h, unit), along(h, second)
    now = mx.arctan2(y, x)
    way = angle - now
    way = way - 2 * math.pi * mx.round(way / (2 * math.pi))
    share = mx.where((adaptive > 0) & (x <= 0), 0.0, coefficient)
    length, then = mx.sqrt(x * x + y * y), now + share * way
    change = (length * mx.cos(then) - x) * unit + (length * mx.sin(then) - y) * second
    return _where(share, h + change.astype(h.dtype), h)


def along(h: mx.array, unit: mx.array) -> mx.array:
    """float32 [B, T, 1]: the projection h.u."""
    return (h * unit).sum(-1, keepdims=True)  # float32 units: a bfloat16 stream is multiplied and summed in float32


def _length(x: mx.array) -> mx.array:
    return mx.sqrt(mx.square(x).sum(-1, keepdims=True))


def _where(coefficient: mx.array, steered: mx.array, h: mx.array) -> mx.array:
    """h + 0 would turn -0.0 into 0.0, and an infinite state into NaN."""
    return mx.where(coefficient == 0, h, steered)


OPERATORS: dict[str, Callable[..., mx.array]] = {
    f.__name__: f for f in (add, add_norm, ablate, ablate_add, clamp, affine, angular)
}
SHARES = ("ablate", "clamp", "affine", "angular")  # a coefficient of 1 is all they can do


def find(name: str) -> Callable[..., mx.array]:
    """The operator of that name. UserError with the nearest one where there is none."""
    if name not in OPERATORS:
        raise UserError(f"no operator {name!r}.{nearest(name, OPERATORS)} There are {', '.join(OPERATORS)}.")
    return OPERATORS[name]


def parts(name: str) -> list[str]:
    """What the operator needs beside h and the coefficient: the names of its keyword arguments."""
    return list(inspect.signature(find(name)).parameters)[2:]
