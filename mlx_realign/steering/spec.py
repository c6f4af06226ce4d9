# SPDX-License-Identifier: Apache-2.0
"""What a steering is asked for: a direction, what is done with it, how strongly, where in the model and in the text."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..directions import unit as unit_of
from ..errors import UserError
from ..flags import nearest
from ..vectors import Direction, spans
from . import operators, where
from .condition import Condition
from .schedule import CONSTANT, Schedule

CONDITION = "condition"  # operator of a file that says when to steer, not how
STRENGTHS = ("add", "add_norm")  # operators of which a coefficient moves a state by as much
BELONGS = {  # fields that mean something to one operator only
    "low": "clamp",
    "high": "clamp",
    "angle": "angular",
    "second": "angular",
    "adaptive": "angular",
    "shift": "affine",
}


@dataclass(frozen=True)
class Steer:
    """One direction at some blocks. Fields are checked here; blocks and width against the model when it is put on."""

    direction: Direction
    coefficient: float = 1.0
    """Times the vector (add, add_norm, ablate_add), or the share of the operator's full effect; 0: the base model."""
    operator: str = "add"
    """A name of `operators`: add, add_norm, ablate, ablate_add, clamp, affine, angular."""
    blocks: tuple[int, ...] | None = None
    """0-based blocks, behind which it acts; -1: what block 0 reads. None: what the direction is meant for."""
    positions: str = "all"
    """all, prompt, generated, last (of the prompt) or start:stop; see `where.window`."""
    unit: Literal["residual", "median_norm"] = "residual"
    """1 is the vector as it is, or one of its direction and the median length of the block's states."""
    schedule: Schedule = CONSTANT
    """How the coefficient changes over generated tokens."""
    condition: Condition | None = None
    """Steer rows that meet it; None: all."""
    low: float | None = None
    """clamp: least projection h.u that is left, in units of the residual stream."""
    high: float | None = None
    """clamp: largest one."""
    angle: float | None = None
    """angular: degrees from the direction, in its plane."""
    second: Direction | None = None
    """angular: what spans the plane with it. None: the first principal component of its vectors at all blocks."""
    adaptive: bool = False
    """angular: turn only states that have a positive share of the direction."""
    shift: float = 0.0
    """affine: how many vectors beyond the baseline's mean the projection ends up."""

    def __post_init__(self) -> None:
        if isinstance(self.blocks, int):
            object.__setattr__(self, "blocks", (self.blocks,))
        operators.find(self.operator)
        where.window(self.positions)
        _check_numbers(self)
        for name, owner in BELONGS.items():
            if owner != self.operator and getattr(self, name) != _DEFAULTS[name]:
                raise UserError(f"steer: {name} belongs to {owner}, and the operator is {self.operator}.")
        if self.operator == "angular" and self.angle is None:
            raise UserError("steer: angular needs an angle, in degrees from the direction.")
        if self.operator == "clamp" and self.low is None and self.high is None:
            raise UserError("steer: clamp needs low, high or both, in units of the residual stream.")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise UserError(f"steer: low is {self.low:g}, above high, which is {self.high:g}.")
        if missing := [block for block in self.at if block not in self.direction.vectors]:
            raise UserError(f"steer: no vector for block {missing[0]}; there are {spans(self.direction.blocks)}.")

    @classmethod
    def of(cls, given: "Steer | Direction", **changes: Any) -> "Steer":
        """A Steer with `changes`; a direction as its file means it to be used, where the changes do not say else."""
        known = ["direction", *_DEFAULTS] if isinstance(given, Steer) else list(_DEFAULTS)
        if unknown := changes.keys() - set(known):
            raise UserError(f"steer has no setting {min(unknown)!r}.{nearest(min(unknown), known)}")
        if isinstance(given, Steer):
            return dataclasses.replace(given, **changes)
        about = given.about
        if about.operator == CONDITION:
            raise UserError("steer: this file holds a condition, which says when to steer: use it as --condition.")
        meant: dict[str, Any] = {"operator": about.operator, "positions": about.positions, "unit": about.strength_unit}
        asked: dict[str, Any] = meant | changes
        if asked["operator"] == about.operator:
            asked = about.numbers | asked
        if about.coefficient is not None and "coefficient" not in changes:
            asked |= _calibrated(given, asked)
        return cls(given, **asked)

    @property
    def at(self) -> tuple[int, ...]:
        """The blocks it acts at."""
        return self.blocks or self.direction.about.blocks or tuple(self.direction.blocks)

    @property
    def kind(self) -> tuple[Any, ...]:
        """Steers that differ in nothing of it differ in numbers alone, and are one operation on rows of a batch."""
        found = where.window(self.positions)
        exact = found is not None and found.exact
        counted = found is not None and self.positions not in ("prompt", "generated")
        condition = self.condition and self.condition.kind
        return self.operator, found is not None, exact, counted, self.schedule.kind != "constant", condition

    @property
    def reach(self) -> int | None:
        """As `taps.reach` has it; a gate is decided anew for each prompt, with nothing kept of the one before."""
        if self.condition:
            return where.FAR
        found = where.window(self.positions)
        behind = 0 if self.schedule.kind != "constant" else None
        return max((at for at in (behind, found and found.reach) if at is not None), default=None)

    def numbers(self, block: int) -> dict[str, np.ndarray]:
        """What the operator needs at a block: float32 vectors [1, d] and numbers [1, 1], by its arguments' names."""
        made = {
            "unit": lambda: self.direction.unit(block)[None],
            "vector": lambda: self._vector(block)[None],
            "low": lambda: [[-np.inf if self.low is None else self.low]],
            "high": lambda: [[np.inf if self.high is None else self.high]],
            "target": lambda: [[self._target(block)]],
            "second": lambda: self._second(block)[None],
            "angle": lambda: [[math.radians(self.angle or 0.0)]],
            "adaptive": lambda: [[float(self.adaptive)]],
        }
        return {name: np.array(made[name](), np.float32) for name in operators.parts(self.operator)}

    def _vector(self, block: int) -> np.ndarray:
        """float64 [d]: what a coefficient of 1 adds."""
        if self.unit == "residual":
            return self.direction.vectors[block].astype(np.float64)
        if block not in self.direction.median_norm:
            raise UserError(
                f"steer: the direction does not say how long the states of block {block} are, so the unit median_norm "
                "has no meaning. Extract it again, or use the unit residual."
            )
        return self.direction.unit(block) * self.direction.median_norm[block]

    def _target(self, block: int) -> float:
        """Projection that affine leaves."""
        if block not in self.direction.baseline:
            raise UserError(
                f"steer: affine needs the mean of the negatives' states at block {block}, which the direction does not "
                "hold. Extract it again, or use ablate."
            )
        mean = self.direction.baseline[block].astype(np.float64)
        return float(mean @ self.direction.unit(block) + self.shift * np.linalg.norm(self._vector(block)))

    def _second(self, block: int) -> np.ndarray:
        """float64 [d]: the part of the second vector that is orthogonal to the direction, at length 1."""
        first, second = self.direction.unit(block), self.second
        if second is None:
            every = np.stack([self.direction.unit(b) for b in self.direction.blocks])
            other = np.linalg.svd(every, full_matrices=False)[2][0]
            other = other * np.sign(other[np.abs(other).argmax()])  # a component has no sign of its own
        else:
            only = second.blocks[0] if len(second.blocks) == 1 else block
            other = second.unit(only)
        rest = other - (other @ first) * first
        if np.linalg.norm(rest) < 1e-3:
            raise UserError(
                f"steer: angular needs a plane, and at block {block} the second vector is the direction itself. "
                "Give another one as `second`: the direction of a block where it differs, or of another behaviour."
            )
        return unit_of(rest)


def _calibrated(given: Direction, asked: dict[str, Any]) -> dict[str, float]:
    """The coefficient of the file, where it means the same; UserError where it would be another strength."""
    about, blocks = given.about, asked.get("blocks")
    if asked["operator"] not in (*STRENGTHS, about.operator) or about.operator not in (*STRENGTHS, asked["operator"]):
        return {}  # of the others 1 is all of what they do
    known = f"steer: {about.coefficient:g} is the coefficient that was found for"
    if about.blocks and blocks and not isinstance(blocks, int) and len(blocks) > len(about.blocks):
        there = spans(list(about.blocks))
        raise UserError(
            f"{known} block {there} alone: for {len(blocks)} blocks give one (FILE:0.5), or extract with --block."
        )
    if asked["unit"] != about.strength_unit:
        raise UserError(f"{known} the unit {about.strength_unit}: with {asked['unit']} give one (FILE:0.3).")
    return {"coefficient": about.coefficient}  # type: ignore[dict-item]


def _check_numbers(steer: Steer) -> None:
    for name in ("coefficient", "low", "high", "angle", "shift"):
        value = getattr(steer, name)
        if value is not None and not (isinstance(value, int | float | np.number) and math.isfinite(value)):
            raise UserError(f"steer: {name} is {value}, expected a finite number.")
    if steer.unit not in ("residual", "median_norm"):
        raise UserError(f"steer: unit is {steer.unit!r}, expected residual or median_norm.")


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(Steer) if f.name != "direction"}
