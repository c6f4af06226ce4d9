# SPDX-License-Identifier: Apache-2.0
"""How a coefficient changes while a completion is generated: a function of the token's index, computed in the graph."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..flags import nearest

Kind = Literal["constant", "linear", "decay"]


@dataclass(frozen=True)
class Schedule:
    """What the coefficient is multiplied by, from `start` at the first generated token towards `end`.

    constant: 1. linear: at `end` after `tokens` tokens, and from there on. decay: half way to `end` after every
    `tokens` tokens. The prompt gets `start`.
    """

    kind: Kind = "constant"
    tokens: float = 1.0
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"no schedule {self.kind!r}.{nearest(self.kind, get_args(Kind))} {_FORMS}")
        if not 0 < self.tokens < math.inf:
            raise UserError(f"schedule {self.kind}: tokens is {self.tokens:g}, expected a number above 0.")
        if self.kind == "constant" and self.start != 1:
            raise UserError("schedule constant: it has no numbers of its own, give the coefficient itself.")
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise UserError(f"schedule {self.kind}: it goes from {self.start:g} to {self.end:g}, which must be finite.")

    def numbers(self) -> np.ndarray:
        """float32 [4], what `factor` takes: start, end, 1 / tokens, whether it decays."""
        end = self.start if self.kind == "constant" else self.end
        return np.array([self.start, end, 1 / self.tokens, self.kind == "decay"], np.float32)


CONSTANT = Schedule()
_FORMS = "Write constant, linear:TOKENS[:START:END] or decay:TOKENS[:START:END]."


def read(text: str) -> Schedule:
    """Schedule of `constant`, `linear:32`, `decay:16`, `linear:32:0:1` (from 0 to 1). UserError where it is none."""
    kind, *rest = text.split(":")
    try:
        numbers = [float(part) for part in rest]
    except ValueError:
        numbers = []
    if len(numbers) != len(rest) or len(rest) not in ((0,) if kind == "constant" else (1, 3)):
        raise UserError(f"schedule {text!r}: {_FORMS}")
    return Schedule(kind, *numbers)  # type: ignore[arg-type]


def factor(index: mx.array, numbers: mx.array) -> mx.array:
    """float32 [B or 1, T]: the factor at generated tokens `index` int32 [B or 1, T], below 0 in the prompt.

    numbers: float32 [B or 1, 4] of `Schedule.numbers`, by row: changing one is no new trace.
    """
    start, end, rate, decays = (numbers[:, i : i + 1] for i in range(4))
    gone = mx.maximum(index, 0) * rate
    left = mx.where(decays > 0, mx.exp(-math.log(2) * gone), 1 - mx.minimum(gone, 1.0))
    return end + (start - end) * left
