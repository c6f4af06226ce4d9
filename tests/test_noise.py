# SPDX-License-Identifier: Apache-2.0
"""What differs by rounding alone is the same; what differs by more, however little, is not."""

from typing import Any

import numpy as np
import pytest
from test_writers import policy_of

from mlx_realign import directions, noise, steerability
from mlx_realign.ablation.extraction import Extracted
from mlx_realign.ablation.settings import Settings
from mlx_realign.errors import UserError

RNG = np.random.default_rng(11)
STATE = RNG.standard_normal(256)
STATE[7] *= 500  # as in models where few entries are far larger than the others


def rounded(size: int, by: float, shift: float = 0.0) -> np.ndarray:
    """float32 [size, d]: one state, each copy with rounding noise of that relative size; moved by a share of it."""
    axis = RNG.standard_normal(256)
    axis[7] = 0
    moved = STATE + shift * np.linalg.norm(STATE) * axis / np.linalg.norm(axis)
    return (moved * (1 + by * RNG.standard_normal((size, 256)))).astype(np.float32)


def bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("sizes", [(8, 8), (7, 12)])
@pytest.mark.parametrize("by", [0.0, 1e-7, 1e-6])
def test_rounding_is_no_direction(by: float, sizes: tuple[int, int]):
    """Sets of unequal size too: a mean of equal states is not exactly that state."""
    positive, negative = (rounded(size, by) for size in sizes)
    assert directions.alike(positive, negative)
    for method in directions.METHODS:
        if method != "pca" or sizes[0] == sizes[1]:
            assert not directions.extract(method, positive, negative).any(), method
    (told,) = steerability.report(positive[:, None], negative[:, None], [0])
    assert told.norm == 0 and not told.auroc.low > 0.5, "rounding could be in order"


@pytest.mark.parametrize("by", [0.0, 1e-7])
def test_a_small_direction_is_one(by: float):
    positive, negative = rounded(8, by, shift=1e-3), rounded(8, by)
    assert not directions.alike(positive, negative)
    for method in directions.METHODS:
        found = directions.extract(method, positive, negative)
        apart = positive.mean(0, dtype=np.float64) - negative.mean(0, dtype=np.float64)
        assert found @ apart > 0.9 * np.linalg.norm(found) * np.linalg.norm(apart), method


def test_states_of_a_bfloat16_model_are_measured_by_its_steps():
    one, other = bfloat16(rounded(8, 0)), bfloat16(rounded(8, 3e-3))  # the last bit of some entries
    assert noise.tolerance(one) == 2.0**-7 and noise.tolerance(rounded(8, 0)) == noise.FLOAT32
    assert (one.mean(0) != other.mean(0)).any() and directions.alike(one, other)
    assert not directions.alike(bfloat16(rounded(8, 0, shift=0.2)), one)


@pytest.mark.parametrize("by", [0.0, 1e-7])
@pytest.mark.parametrize("options", [{}, {"variant": "projected"}, {"method": "lda"}, {"rank": 2}])
def test_blocks_whose_states_differ_by_rounding_lose_nothing(options: dict[str, Any], by: float):
    """As on another processor: what is equal bit for bit here differs there in the last one."""
    sides = RNG.standard_normal((8, 4, 256)) + 1, RNG.standard_normal((8, 4, 256))
    for side in sides:
        side[:, 1] = rounded(8, by)
    settings = Settings(model="m", positive="p", **options)
    found = Extracted(policy_of("llama"), settings, [], {-1: sides}, {})
    assert list(found.by_block(None, -1)) == [1, 2]
    for side in sides:
        side[:, 1:] = rounded(8, by)[:, None]
    with pytest.raises(UserError, match="both sets give the same states there"):
        found.by_block(None, -1)
