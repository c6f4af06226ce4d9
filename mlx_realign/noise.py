# SPDX-License-Identifier: Apache-2.0
"""What of a difference is rounding: the same numbers, computed twice, differ in their last bits.

Batches of another shape, another processor or another BLAS add up in another order. What is asked of such numbers is
therefore never whether they are equal, but whether they differ by more than the arithmetic that made them.
"""

import os
import re

import mlx.core as mx
import numpy as np

FLOAT32 = 3e-5  # relative: some hundred roundings, as many layers bring
TF32_BITS = 10  # after the point, as float16 has them
COARSE = {7: 0xFFFF, TF32_BITS: 0x1FFF}  # bits of bfloat16 and float16: those of float32 that are then zero
FIRST_SHORT = 17  # generation of Apple's GPUs that multiplies float32 with so few bits: the M5's


def short_products() -> bool:
    """Whether float32 matmuls, attention and quantised matmuls may keep 10 bits of what they multiply (TF32).

    An M5's and NVIDIA's do where the shape suits them, unless MLX_ENABLE_TF32=0; CPUs and older Apple GPUs never.
    """
    if mx.default_device().type == mx.DeviceType.cpu or os.environ.get("MLX_ENABLE_TF32", "1").strip() == "0":
        return False
    apple = re.match(r"applegpu_g(\d+)", str(mx.device_info().get("architecture", "")))
    return apple is None or int(apple[1]) >= FIRST_SHORT


def judged_as(dtype: mx.Dtype) -> mx.Dtype:
    """Whose limits numbers computed in `dtype` are held to here: float16's, where float32 is multiplied so."""
    return mx.float16 if dtype == mx.float32 and short_products() else dtype


def tolerance(states: np.ndarray) -> float:
    """Relative size of rounding in states of any shape: of float32, or a step of the narrower dtype most are of.

    A step of 10 bits too where float32 is multiplied with so many.
    """
    bits = np.ascontiguousarray(states, np.float32).view(np.uint32)
    bits = bits[bits << 1 != 0]  # zeros are of any dtype
    for digits, below in COARSE.items():
        if bits.size and np.count_nonzero(bits & below == 0) > bits.size / 2:
            return 2.0**-digits
    return 2.0**-TF32_BITS if short_products() else FLOAT32


def of(*states: np.ndarray) -> np.ndarray:
    """Largest rounding to expect in each entry of states [n, d], float64 [d].

    An entry's own size counts, and the usual one: few may be hundreds of times as large as the others.
    """
    every = np.concatenate(states)
    sizes = np.sqrt(np.mean(np.square(every, dtype=np.float64), axis=0))
    return tolerance(every) * (sizes + np.median(sizes))


def only(difference: np.ndarray, noise: np.ndarray) -> bool:
    """Whether a difference [..., d] of states is no more than their `noise` [d], in the root mean square."""
    shares = np.divide(difference, noise, out=np.where(difference == 0, 0.0, np.inf), where=noise > 0)
    return float(np.sqrt(np.mean(shares**2))) <= 1
