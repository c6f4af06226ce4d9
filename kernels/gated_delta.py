# SPDX-License-Identifier: Apache-2.0
"""The gated delta rule in chunks: a few matmuls for 64 tokens where mlx-lm takes a step a token, and a gradient.

    S_t = S_{t-1} diag(g_t) + beta_t (v_t - S_{t-1} diag(g_t) k_t) k_t^T,    y_t = S_t q_t

(Gated DeltaNet, arXiv:2412.06464; Kimi Linear, arXiv:2510.26692, where g has an entry per key channel.) Within a chunk
what each token adds, d_t = beta_t (...), solves (I + A) D = beta (V - (K exp(G)) S_0^T), where G is the running sum of
log g and A is strictly lower triangular, A_ti = beta_t sum_c k_tc k_ic exp(G_tc - G_ic) (arXiv:2406.06484). Exponents
are sums over the tokens in between, so never positive: no gate is too strong. With a gate per channel such an
exponential is no product of two factors that float32 could hold, so these chunks are short.

Kernels of a GPU for this have no gradient in mlx-lm. `mx.fast.gated_delta_update` has both, for the shapes in FAST.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

CHUNK, CHANNELS_CHUNK = 64, 16  # tokens; with a gate per key channel
FAST = {(16, 16), (16, 32), (16, 48), (16, 64), (24, 24), (32, 32)}  # heads of keys and values, at widths of 128


def log_gate(a: mx.array, A_log: mx.array, dt_bias: mx.array, lower_bound: float | None = None) -> mx.array:
    """float32 log g, never positive; [B, T, Hv] or [B, T, Hv, Dk] as `a` is. mlx-lm's compute_g is its exponential."""
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        return -rate * nn.softplus(a + dt_bias).astype(mx.float32)
    return lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))


def chunked(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """Outputs [B, T, Hv, Dv] in q's dtype and the last state float32 [B, Hv, Dv, Dk].

    q, k: [B, T, Hk, Dk], v: [B, T, Hv, Dv] with Hv a multiple of Hk; log_g: [B, T, Hv] or [B, T, Hv, Dk]; beta:
    [B, T, Hv]; state: [B, Hv, Dv, Dk].
    """
    length, dtype = q.shape[1], q.dtype
    size = CHUNK if log_g.ndim == 3 else CHANNELS_CHUNK
    size = min(size, 1 << max(0, length - 1).bit_length())  # a power of 2: see `_inverse`
    spare = -length % size
    heads = v.shape[2] // q.shape[2]
    if heads > 1:
        q, k = (mx.repeat(x, heads, 2) for x in (q, k))
    # [B, H, chunks, C, ...]; added tokens have beta 0 and log g 0, and so leave the state as it is
    parts = [_cut(x.astype(mx.float32), size, spare) for x in (q, k, v, log_g, beta[..., None])]
    q, k, v, log_g, beta = parts
    log_g = log_g[..., None] if log_g.ndim == 4 else log_g
    gain = mx.exp(mx.cumsum(log_g, axis=-2))  # since the chunk's start, [B, H, n, C, 1 or Dk]
    among, reads, left = _scores(q, k, log_g, beta)
    solved = _inverse(among) @ mx.concatenate([beta * v, beta * gain * k], -1)
    new, old = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]  # D = new - old S_0^T
    asked, kept = q * gain, gain[..., -1:, :]
    state, made = state.astype(mx.float32), []
    for i in range(q.shape[2]):
        delta = new[:, :, i] - old[:, :, i] @ state.swapaxes(-1, -2)
        made.append(asked[:, :, i] @ state.swapaxes(-1, -2) + reads[:, :, i] @ delta)
        state = state * kept[:, :, i] + delta.swapaxes(-1, -2) @ left[:, :, i]
    y = mx.stack(made, 2)
    y = y.reshape(*y.shape[:2], -1, y.shape[-1]).swapaxes(1, 2)
    return y[:, :length].astype(dtype), state


def _cut(x: mx.array, size: int, spare: int) -> mx.array:
    """[B, T, H, ...] -> [B, H, chunks, size, ...], filled with zeros."""
    x = mx.pad(x, [(0, 0), (0, spare), *[(0, 0)] * (x.ndim - 2)]) if spare else x
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])


def _scores(q: mx.array, k: mx.array, log_g: mx.array, beta: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """A, strictly lower, and what queries read of each token of their chunk, [B, H, n, C, C]; the keys as they are left
    at the chunk's end.

    Gates between two tokens are summed from one to the other: of two long sums the difference would be rounding.
    """
    size = q.shape[-2]
    seen, before = mx.tri(size, dtype=mx.bool_), mx.tri(size, k=-1, dtype=mx.bool_)
    if log_g.shape[-1] == 1:
        fades = mx.exp(mx.cumsum(mx.where(before, log_g, 0), axis=-2))  # [.., t, i]: from i to t
        keys, reads = fades * (k @ k.swapaxes(-1, -2)), fades * (q @ k.swapaxes(-1, -2))
        left = k * fades[..., -1, :, None]
    else:
        fades = mx.exp(mx.cumsum(mx.where(before[..., None], log_g[..., :, None, :], 0), axis=-3))
        fading = fades * k[..., None, :, :]  # [B, H, n, C, C, Dk]
        keys, reads = ((fading @ x[..., None]).squeeze(-1) for x in (k, q))
        left = fading[..., -1, :, :]
    return mx.where(before, beta * keys, 0), mx.where(seen, reads, 0), left


def _inverse(lower: mx.array) -> mx.array:
    """(I + A)^-1 of A strictly lower triangular [..., C, C], C a power of 2: by blocks that double, which is stable."""
    size = lower.shape[-1]
    found = mx.ones((*lower.shape[:-2], size, 1, 1))  # inverses of the blocks on the diagonal
    width = 1
    while width < size:
        blocks = size // (2 * width)
        below = lower.reshape(*lower.shape[:-2], blocks, 2, width, blocks, 2, width)
        below = mx.stack([below[..., i, 1, :, i, 0, :] for i in range(blocks)], -3)
        first, second = found[..., 0::2, :, :], found[..., 1::2, :, :]
        corner = -(second @ below @ first)
        top = mx.concatenate([first, mx.zeros_like(corner)], -1)
        found = mx.concatenate([top, mx.concatenate([corner, second], -1)], -2)
        width *= 2
    return found.squeeze(-3)


def fits(q: mx.array, v: mx.array, log_g: mx.array, mask: mx.array | None) -> bool:
    """Whether MLX's own kernels, forward and backward, serve these shapes on a GPU (MLX 0.32.4)."""
    heads, widths = (q.shape[2], v.shape[2]), (q.shape[-1], v.shape[-1])
    return mask is None and log_g.ndim == 3 and widths == (128, 128) and heads in FAST


def on_gpu() -> bool:
    """Whether Metal kernels are called."""
    return mx.default_device() == mx.gpu and mx.metal.is_available()


def heads_of(modules: Sequence[Any]) -> set[tuple[int, int]]:
    """Those of FAST that a model has, by its modules: only these are worth a check."""
    found = {(getattr(one, "num_k_heads", 0), getattr(one, "num_v_heads", 0)) for one in modules}
    return found & FAST


def of(
    on: Callable[[], bool], stock: Callable[..., Any], *, chunks: bool = True, fast: Collection[tuple[int, int]] = FAST
) -> Callable[..., tuple[mx.array, mx.array]]:
    """mlx-lm's `gated_delta_update`, with a gradient on every device; `stock` itself for single tokens and when off.

    chunks: False takes mlx-lm's steps in their place, as they have a gradient too. fast: heads for which a GPU takes
    `mx.fast.gated_delta_update`.
    """

    def gated_delta_update(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        a: mx.array,
        b: mx.array,
        A_log: mx.array,
        dt_bias: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
        *,
        use_kernel: bool = True,
        lower_bound: float | None = None,
        allow_neg_eigval: bool = False,
    ) -> tuple[mx.array, mx.array]:
        decoding = q.shape[1] == 1 and state is not None  # which has no gradient
        if decoding or not on() or not chunks:
            options: dict[str, Any] = {"lower_bound": lower_bound, "allow_neg_eigval": allow_neg_eigval}
            kernel = use_kernel and (decoding or not on())
            return stock(q, k, v, a, b, A_log, dt_bias, state, mask, use_kernel=kernel, **options)
        beta = mx.sigmoid(b) * (2.0 if allow_neg_eigval else 1.0)
        log_g = log_gate(a, A_log, dt_bias, lower_bound)
        if state is None:
            state = mx.zeros((q.shape[0], v.shape[2], v.shape[3], q.shape[3]), mx.float32)
        if on_gpu() and (q.shape[2], v.shape[2]) in fast and fits(q, v, log_g, mask):
            y, state = mx.fast.gated_delta_update(q, k, v, mx.exp(log_g), beta, state)
            return y.astype(q.dtype), state
        if mask is not None:  # such a token leaves the state as it is
            beta = mx.where(mask[..., None], beta, 0)
            log_g = mx.where(mask.reshape(*mask.shape, *[1] * (log_g.ndim - 2)), log_g, 0)
        return chunked(q, k, v, log_g, beta, state)

    return gated_delta_update
