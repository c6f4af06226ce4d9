# SPDX-License-Identifier: Apache-2.0
"""Low-rank layers around a frozen base: LoRA (arXiv:2106.09685) and DoRA (arXiv:2402.09353).

Every layer here computes base(x) + (x A) (s B). A and B are trained in float32 and cast to the stream's dtype at use,
so a bfloat16 stream stays bfloat16. The scale s is an array, not a number: compiled traces read it at run time, and at
0 the layer gives exactly what its base gives. Layout of A and B is mlx-lm's, so that its loader reads what we save.
"""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .workers import stretch

Base = Any  # a linear, embedding or expert layer, dense or quantised: MLX's types do not say what attributes they have

LINEAR = (nn.Linear, nn.QuantizedLinear)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
TRAINED = ("lora_a", "lora_b", "m")  # the names of an adapter's own arrays, in files too


class Adapter(nn.Module):
    """What all adapter layers share: the scale, and the key of the dropout.

    Underscore arrays are state, which compiled traces read, but neither trained nor saved.
    """

    lora_a: mx.array
    lora_b: mx.array
    _scale: mx.array
    _dropout_key: mx.array | None
    by_hand = True  # gradients of the linear layers; False: MLX's own, which those are checked against

    def __init__(self, scale: float, dropout: float):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self._scale = mx.array(scale, dtype=mx.float32)
        self._dropout_key = None
        self.off = False

    def enable(self, on: bool) -> None:
        """On, or off: then the layer gives what its base gives.

        A trace compiled while it was on gives that by the scale alone; otherwise the low-rank side is not computed.
        """
        self.off = not on
        self._scale = mx.array(self.scale if on else 0.0, dtype=mx.float32)

    def drop(self, x: mx.array) -> mx.array:
        """Dropout whose mask depends on `_dropout_key` alone: a checkpointed layer draws it again when recomputed."""
        if self._dropout_key is None or self.dropout == 0:
            return x
        keep = mx.random.bernoulli(1 - self.dropout, x.shape, key=self._dropout_key)
        return mx.where(keep, x * (1 / (1 - self.dropout)), 0)


class LoRALinear(Adapter):
    """base(x) + s (x A) B on an nn.Linear or nn.QuantizedLinear; A float32 [in, r], B float32 [r, out].

    A starts as U(-1/sqrt(in), 1/sqrt(in)) and B as zeros, as in PEFT and mlx-lm, so a fresh layer equals its base.
    """

    def __init__(self, linear: Base, *, rank: int, scale: float, dropout: float, key: mx.array):
        super().__init__(scale, dropout)
        outputs, inputs = matrix_shape(linear)
        self.linear = linear
        self.lora_a = uniform(key, (inputs, rank), 1 / math.sqrt(inputs))
        self.lora_b = mx.zeros((rank, outputs))

    def __call__(self, x: mx.array) -> mx.array:
        return low_rank_linear(self, x)


class DoRALinear(Adapter):
    """(m / n) (W x + s B A x) + bias, n = ||W + s B A|| per output row, taken as a constant in the gradient.

    m float32 [out] starts as ||W||. n comes from ||W||^2 + 2 s <W A, B> + s^2 <A^T A B, B>: one rank-wide product with
    W instead of a pass over a dequantised [out, in] array, and right for every bit width.
    """

    def __init__(self, linear: Base, *, rank: int, scale: float, dropout: float, key: mx.array):
        super().__init__(scale, dropout)
        outputs, inputs = matrix_shape(linear)
        self.linear = linear
        self.lora_a = uniform(key, (inputs, rank), 1 / math.sqrt(inputs))
        self.lora_b = mx.zeros((rank, outputs))
        self._base_norm_squared = dense_weight(linear).astype(mx.float32).square().sum(axis=1)
        self.m = mx.sqrt(self._base_norm_squared)
        mx.eval(self.m, self._base_norm_squared)  # so that no dequantised copy outlives this line

    def __call__(self, x: mx.array) -> mx.array:
        y = low_rank_linear(self, x)
        # Off must mean the base: m has moved by then, so it is left out as well.
        gain = mx.where(self._scale == 0, 1.0, self.m / self.norm())
        return _amplified(y, gain, self.linear.bias if "bias" in self.linear else None)

    def norm(self) -> mx.array:
        """float32 [out]: row norms of W + s (A B)^T, no gradient."""
        a, b = mx.stop_gradient(self.lora_a), mx.stop_gradient(self.lora_b) * self._scale
        # Casting the small A is cheap, casting W to A's dtype is not; the cross term is small beside ||W||^2.
        dtype = mx.float32 if "scales" in self.linear else self.linear.weight.dtype
        cross = matmul_transposed(self.linear, a.T.astype(dtype)).astype(mx.float32)
        squared = self._base_norm_squared + ((2 * cross + (a.T @ a) @ b) * b).sum(axis=0)
        return mx.stop_gradient(mx.sqrt(mx.maximum(squared, 1e-30)))  # a row of zeros would divide by zero


class LoRAEmbedding(Adapter):
    """base[x] + (A[x]) (s B), A float32 [vocab, r], B float32 [r, width]; `as_linear` serves a tied head.

    A starts as zeros and B as N(0, 1), as in PEFT: rows of tokens never seen stay where they were.
    """

    def __init__(self, embedding: Base, *, rank: int, scale: float, dropout: float, key: mx.array):
        super().__init__(scale, dropout)
        vocabulary, width = matrix_shape(embedding)
        self.embedding = embedding
        self.lora_a = mx.zeros((vocabulary, rank))
        self.lora_b = mx.random.normal((rank, width), key=key)

    def __call__(self, x: mx.array) -> mx.array:
        y = self.embedding(x)
        b = (self.lora_b * self._scale).astype(y.dtype)
        return mx.addmm(y, self.lora_a[x].astype(y.dtype), b)

    def as_linear(self, x: mx.array) -> mx.array:
        b = (self.lora_b * self._scale).astype(x.dtype)
        return mx.addmm(self.embedding.as_linear(x), self.drop(x) @ b.T, self.lora_a.T.astype(x.dtype))


class LoRASwitchLinear(Adapter):
    """LoRA on every expert of a mixture; A float32 [experts, r, in], B float32 [experts, out, r]."""

    def __init__(self, linear: Base, *, rank: int, scale: float, dropout: float, key: mx.array):
        super().__init__(scale, dropout)
        experts, outputs, inputs = linear.num_experts, linear.output_dims, linear.input_dims
        self.linear = linear
        self.lora_a = uniform(key, (experts, rank, inputs), 1 / math.sqrt(inputs))
        self.lora_b = mx.zeros((experts, outputs, rank))

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        y = self.linear(x, indices, sorted_indices=sorted_indices)
        a = self.lora_a.swapaxes(-1, -2).astype(x.dtype)
        b = (self.lora_b * self._scale).swapaxes(-1, -2).astype(x.dtype)
        z = mx.gather_mm(self.drop(x), a, rhs_indices=indices, sorted_indices=sorted_indices)
        return y + mx.gather_mm(z, b, rhs_indices=indices, sorted_indices=sorted_indices)


def wrap(module: Base, *, rank: int, scale: float, dropout: float, dora: bool, key: mx.array) -> Adapter:
    """The adapter layer for a linear, embedding or expert layer. Raises TypeError where DoRA has no such layer."""
    if isinstance(module, LINEAR):
        layer = DoRALinear if dora else LoRALinear
    elif dora:
        raise TypeError(f"DoRA is for linear layers, not for {type(module).__name__}")
    else:
        layer = LoRASwitchLinear if isinstance(module, SWITCH) else LoRAEmbedding
    return layer(module, rank=rank, scale=scale, dropout=dropout, key=key)


def base_of(adapter: Adapter) -> Base:
    """The frozen layer inside."""
    return adapter["embedding" if isinstance(adapter, LoRAEmbedding) else "linear"]


def low_rank_linear(layer: Any, x: mx.array) -> mx.array:
    """base(x) + (x A) (s B); x [..., in] -> [..., out] in x's dtype."""
    if layer.off:
        y = layer.linear(x)
        stretch(y)
        return y
    a = layer.lora_a.astype(x.dtype)
    b = (layer.lora_b * layer._scale).astype(x.dtype)  # the scale goes to the small side: no pass over [tokens, out]
    if not Adapter.by_hand or (layer._dropout_key is not None and layer.dropout > 0):
        return mx.addmm(layer.linear(x), layer.drop(x) @ a, b)
    return _fused(layer.linear, x, a, b)


def _fused(linear: Base, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """The gradient by hand: automatic differentiation would add two [tokens, in] arrays where one addmm does."""
    weights = [] if "scales" in linear else [linear[name] for name in ("weight", "bias") if name in linear]
    stream = mx.default_stream(mx.default_device())

    @mx.custom_function
    def run(x: mx.array, a: mx.array, b: mx.array, *weights: mx.array) -> Any:
        return mx.addmm(linear(x), x @ a, b)

    @run.vjp
    def gradients(primals: tuple[mx.array, ...], dy: mx.array, _: mx.array) -> tuple[mx.array, ...]:
        x, a, b, *weights = primals
        with mx.stream(stream):  # where the forward ran: built-in gradients follow it there, those of Python would not
            d = dy @ b.T
            dx = mx.addmm(matmul(linear, dy), d, a.T)
            rows, drows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            da, db = (d.reshape(-1, d.shape[-1]).T @ rows).T, (rows @ a).T @ drows
            # Lazy: computed only where someone trains the base as well.
            base = [drows.T @ rows, drows.sum(axis=0)][: len(weights)]
        stretch(dx, da, db)
        return dx, da, db, *base

    y: Any = run(x, a, b, *weights)
    stretch(y)
    return y


def _amplified(y: mx.array, gain: mx.array, bias: mx.array | None) -> mx.array:
    """gain (y - bias) + bias, exactly y where gain is 1; its gradient needs the result only, so y need not be kept."""
    stream = mx.default_stream(mx.default_device())

    def plain(y: mx.array, gain: mx.array, *bias: mx.array) -> Any:
        gain = gain.astype(y.dtype)
        return y * gain + (1 - gain) * bias[0] if bias else y * gain

    run = mx.custom_function(plain)

    @run.vjp
    def gradients(primals: tuple[mx.array, ...], dy: mx.array, out: mx.array) -> tuple[mx.array, ...]:
        _, gain, *bias = primals
        summed = lambda x: x.astype(mx.float32).reshape(-1, x.shape[-1]).sum(axis=0)  # noqa: E731
        with mx.stream(stream):
            total = summed(dy * (out - bias[0]) if bias else dy * out)
            dbias = [((1 - gain) * summed(dy)).astype(b.dtype) for b in bias]
            return dy * gain.astype(dy.dtype), mx.where(gain == 0, 0, total / gain), *dbias

    amplified: Any = (run if Adapter.by_hand else plain)(y, gain, *([] if bias is None else [bias]))
    return amplified


def matmul(linear: Base, y: mx.array) -> mx.array:
    """y W for W [out, in]: [..., out] -> [..., in]; dense or quantised, no bias."""
    return _product(linear, y, transpose=False)


def matmul_transposed(linear: Base, x: mx.array) -> mx.array:
    """x W^T: [..., in] -> [..., out]; dense or quantised, no bias."""
    return _product(linear, x, transpose=True)


def _product(linear: Base, x: mx.array, transpose: bool) -> mx.array:
    if "scales" not in linear:
        return x @ (linear.weight.T if transpose else linear.weight)
    return mx.quantized_matmul(
        x, linear.weight, linear.scales, linear.get("biases"), transpose=transpose, **quantisation(linear)
    )


def quantisation(module: Base) -> dict[str, Any]:
    """group_size, bits and mode of a quantised layer, as mx.quantize takes them."""
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


def dense_weight(module: Base) -> mx.array:
    """The weight as floats, dequantised where need be."""
    if "scales" not in module:
        return module.weight
    return mx.dequantize(module.weight, module.scales, module.get("biases"), **quantisation(module))


def matrix_shape(module: Base) -> tuple[int, int]:
    """(out, in) of a linear layer, (vocab, width) of an embedding: of the real matrix, not of its packed bits."""
    if "scales" in module:
        return module.weight.shape[0], module.scales.shape[-1] * module.group_size
    return module.weight.shape[0], module.weight.shape[1]


def uniform(key: mx.array, shape: tuple[int, ...], bound: float) -> mx.array:
    """float32 U(-bound, bound)."""
    return mx.random.uniform(-bound, bound, shape, key=key)
