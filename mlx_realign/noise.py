# SPDX-License-Identifier: Apache-2.0
"""What of a difference of hidden states is rounding: the same states, computed twice, differ in their last bits.

Batches of another shape, another processor or another BLAS add up in another order. What is asked of such numbers is
therefore never whether they are equal, but whether they differ by more than the arithmetic that made them.
"""

import numpy as np

FLOAT32 = 3e-5  # relative: some hundred roundings, as many layers bring
COARSE = {7: 0xFFFF, 10: 0x1FFF}  # bits after the point of bfloat16 and float16: those of float32 that are then zero


def tolerance(states: np.ndarray) -> float:
    """Relative size of rounding in states of any shape: of float32, or a step of the narrower dtype most are of."""
    bits = np.ascontiguousarray(states, np.float32).view(np.uint32)
    bits = bits[bits << 1 != 0]  # zeros are of any dtype
    for digits, below in COARSE.items():
        if bits.size and np.count_nonzero(bits & below == 0) > bits.size / 2:
            return 2.0**-digits
    return FLOAT32


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
