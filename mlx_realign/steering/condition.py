# SPDX-License-Identifier: Apache-2.0
"""Steering of some prompts only: a gate per row, decided by the prompt's states at one block. CAST, arXiv:2409.05907.

The gate is decided at the last prompt token and holds for the rest of the row. Tokens before it are never steered, so
a row whose gate stays closed is the base model's bit for bit, and it does not matter in how many pieces its prompt
was computed or which rows it shares a batch with. (CAST's own code computes a prompt in one pass and steers all of it.)
Blocks from the condition's on are steered from the last prompt token on, blocks below it from the token after.

Everything is arrays: no device is waited for, and a new threshold is no new trace. The gate and what it needs are kept
in the notes of the cache. mlx-lm's batch generator moves rows between caches and would lose them: UserError there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from ..errors import UserError
from ..policy import Policy
from ..prompt_caches import Reader
from ..vectors import Direction
from ..vectors import load as read_direction
from .operators import along
from .where import HELP, Pass


@dataclass(frozen=True)
class Condition:
    """Which prompts are steered.

    signed: (h - baseline).u, the projection on the unit direction in units of the residual stream (the baseline is
    the direction's own mean of negatives, 0 where it has none). cosine: CAST's cos(h, tanh(P h)) with P the projector
    on the direction. reading: h is the state of the last prompt token, or the mean over all prompt tokens (CAST).
    sense: the gate opens for scores above the threshold, or below (CAST's "larger", which says what the threshold is).
    """

    direction: Direction
    block: int
    threshold: float
    sense: Literal["above", "below"] = "above"
    reading: Literal["last", "mean"] = "last"
    score: Literal["signed", "cosine"] = "signed"

    def __post_init__(self) -> None:
        for name, known in (("sense", ("above", "below")), ("reading", ("last", "mean")), ("score", _SCORES)):
            if getattr(self, name) not in known:
                raise UserError(f"condition: {name} is {getattr(self, name)!r}, expected {known[0]} or {known[1]}.")
        if not np.isfinite(self.threshold):
            raise UserError(f"condition: the threshold is {self.threshold}, expected a number.")
        self.direction.unit(self.block)  # its UserError where there is none

    @property
    def kind(self) -> tuple[int, str, str]:
        """Conditions that differ in nothing of it differ in numbers alone."""
        return self.block, self.reading, self.score

    def numbers(self) -> dict[str, np.ndarray]:
        """What `read` takes: unit float32 [1, d]; offset, threshold and sign float32 [1]."""
        unit = self.direction.unit(self.block)
        offset = float(_baseline(self.direction, self.block) @ unit)
        sign = 1.0 if self.sense == "above" else -1.0
        found = {"unit": unit[None], "offset": [offset], "threshold": [self.threshold], "sign": [sign]}
        return {name: np.array(value, np.float32) for name, value in found.items()}


_SCORES = ("signed", "cosine")
KEPT = ("threshold", "sense", "reading", "score")  # in a file, beside its direction and block


def scores(states: np.ndarray, direction: Direction, block: int, score: str = "signed") -> np.ndarray:
    """float64 [n] of prompt states [n, d] at one block: what `Condition` compares with its threshold."""
    states, unit = np.asarray(states, np.float64), direction.unit(block)
    if score == "signed":
        return (states - _baseline(direction, block)) @ unit
    bent = np.tanh(np.outer(states @ unit, unit))
    lengths = np.linalg.norm(states, axis=1) * np.linalg.norm(bent, axis=1)
    return (states * bent).sum(1) / np.maximum(lengths, 1e-30)


def _baseline(direction: Direction, block: int) -> np.ndarray:
    return direction.baseline.get(block, np.zeros(direction.width)).astype(np.float64)


def load(file: str | Path, policy: Policy, *, force: bool | None = False) -> Condition:
    """The condition of a file, checked against the model. UserError for a file that holds none."""
    direction = read_direction(file, policy=policy, force=force)
    told = direction.about.measured.get("condition")
    if not isinstance(told, dict) or told.keys() != {*KEPT, "block"}:
        raise UserError(f"{file}: holds no condition. Make one: mlx-realign steer condition --help.")
    return Condition(direction, **told)


# ------------------------------------------------------------------ in the graph


def read(condition: Condition, numbers: dict[str, mx.array], h: mx.array, now: Pass, key: str) -> None:
    """At the condition's block: keep each row's gate, float32 [B], under `key` of the pass's notes.

    numbers: those of `Condition.numbers` by row, [1 or B, 1, d] and [1 or B, 1]; h [B, T, d] what the block gives.
    """
    cache, latest = now.place.cache, condition.reading == "last"
    if now.place.moves:
        raise UserError(
            f"steer: mlx-lm moves rows between caches of this kind ({type(cache).__name__}), and a condition cannot "
            "follow them. Generate one prompt at a time with mlx_lm.generate, or take the condition off."
        )
    if now.guessed and latest:
        raise UserError(f"steer: this condition reads the last prompt token, which this cache does not tell: {HELP}.")
    if key not in now.notes and isinstance(now.place.start, int) and now.place.start > 0:
        raise UserError("steer: a condition must see the prompt, and this cache holds one computed without it.")
    if now.guessed and not now.prompting:
        return
    last = now.last[:, None]
    here = now.positions == last
    picked = here if latest else (now.positions >= 0) & (now.positions <= last)
    linear = condition.score == "signed"
    value = along(h, numbers["unit"]) if linear else h.astype(mx.float32)
    found = mx.where(picked[..., None], value, 0.0).sum(1)  # [B, 1] or [B, d]
    if not latest:  # over all prompt tokens in this cache, of earlier turns too
        count = mx.broadcast_to(picked.sum(1, keepdims=True), (h.shape[0], 1)) + now.notes.get(key + "count", 0)
        found = found + now.notes.get(key + "total", 0.0)
        now.notes[key + "total"], now.notes[key + "count"] = found, count
        found = found / mx.maximum(count, 1)
    score = found - numbers["offset"] if linear else _cosine(found, numbers["unit"][:, 0])
    opens = (numbers["sign"] * (score - numbers["threshold"]) > 0)[:, 0].astype(mx.float32)
    before = now.notes.get(key, mx.zeros(h.shape[0]))
    now.notes[key] = mx.where(here.any(1), opens, before)


def gate(condition: Condition, now: Pass, block: int, key: str) -> mx.array:
    """float32 [B or 1, 1 or T]: 1 where a row's gate is open at this block, 0 elsewhere."""
    cache, kept = now.place.cache, now.notes.get(key)
    whole = isinstance(cache, Reader) or (cache is None and now.told)
    if block < condition.block and whole and now.columns > 1:
        raise UserError(
            f"steer: block {block} comes before block {condition.block}, whose states open the gate, so a text that is "
            "computed in one pass cannot be steered there. Take a condition at a block that is not above it."
        )
    if kept is None or (now.guessed and now.prompting):
        return mx.zeros((1, 1))
    return kept[:, None] if now.columns == 1 else kept[:, None] * (now.positions >= now.last[:, None])


def _cosine(h: mx.array, unit: mx.array) -> mx.array:
    """float32 [B, 1]: cos(h, tanh((h.u) u)) of h [B, d]."""
    bent = mx.tanh((h * unit).sum(-1, keepdims=True) * unit)
    lengths = mx.sqrt(mx.square(h).sum(-1, keepdims=True) * mx.square(bent).sum(-1, keepdims=True))
    return (h * bent).sum(-1, keepdims=True) / mx.maximum(lengths, 1e-30)


# ------------------------------------------------------------------ fitting


class Point(NamedTuple):
    """How well a block's score tells positive prompts from negative ones."""

    block: int
    threshold: float  # of the best F1 on these prompts, half way between two scores
    sense: Literal["above", "below"]
    f1: float
    auroc: float  # chance that a positive scores higher than a negative (lower, where the sense is "below")


class Fit(NamedTuple):
    """The condition at the best block, and all blocks that were tried."""

    condition: Condition
    table: list[Point]


def fit(
    positive: np.ndarray,
    negative: np.ndarray,
    direction: Direction,
    blocks: Sequence[int],
    *,
    reading: Literal["last", "mean"] = "last",
    score: Literal["signed", "cosine"] = "signed",
) -> Fit:
    """Block and threshold that open the gate for positive prompts with the best F1; the AUROC decides between equals.

    positive [n, blocks, d], negative [m, blocks, d]: states at `blocks`, read as the condition will read them
    (capture.collect at position -1, or means over the prompts' tokens). F1 is what these same prompts give. Thresholds
    are tried between all scores, and both senses. Blocks without a vector in the direction are left out.
    """
    if positive.ndim != 3 or negative.ndim != 3 or not positive.shape[1] == negative.shape[1] == len(blocks):
        raise ValueError(f"expected states [n, {len(blocks)}, d], got {positive.shape} and {negative.shape}")
    if not (len(positive) and len(negative)):
        raise UserError("a condition needs prompts of both kinds, those to steer and those to leave alone.")
    tried = [
        point(scores(positive[:, i], direction, block, score), scores(negative[:, i], direction, block, score), block)
        for i, block in enumerate(blocks)
        if block in direction.vectors
    ]
    if not tried:
        raise UserError(f"the direction has no vector at the blocks {', '.join(map(str, blocks))}.")
    best = max(tried, key=lambda p: (p.f1, p.auroc))
    return Fit(Condition(direction, best.block, best.threshold, best.sense, reading, score), tried)


def point(positive: np.ndarray, negative: np.ndarray, block: int = 0) -> Point:
    """The threshold of best F1 between scores [n] and [m], float64."""
    above = float((positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2)
    high, low = _best_f1(positive, negative), _best_f1(-positive, -negative)
    if (high[0], above) >= (low[0], 1 - above):
        return Point(block, high[1], "above", high[0], above)
    return Point(block, -low[1], "below", low[0], 1 - above)


def _best_f1(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """(F1, threshold) for gates that open above the threshold."""
    every = np.unique(np.concatenate([positive, negative]))
    spread = max(float(np.ptp(every)), 1e-6)
    cuts = np.concatenate([[every[0] - spread / 2], (every[1:] + every[:-1]) / 2])
    right = len(positive) - np.searchsorted(np.sort(positive), cuts, side="right")
    wrong = len(negative) - np.searchsorted(np.sort(negative), cuts, side="right")
    f1 = 2 * right / (right + wrong + len(positive))
    widest = np.flatnonzero(f1 == f1.max())[-1]  # of equals the one that opens least
    return float(f1[widest]), float(cuts[widest])
