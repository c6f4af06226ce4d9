# SPDX-License-Identifier: Apache-2.0
"""Prompts -> directions of every block at the positions where they may be read, and how well each separates."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import capture, directions, rollout, steerability, vectors
from ..errors import UserError
from ..policy import Policy
from ..sampling import Sampling
from ..steerability import Separation
from ..steering import pairs
from ..steering.extract import METHODS, position_of
from ..steering.pairs import Contrast, Prompt
from ..vectors import About, Direction
from .settings import Settings

GRID = 5  # positions of a template's end that are looked at
COMPLETED = 64  # prompts of a set whose completions are made where nobody asked for them
LEAST = 32  # prompts of a set for the direction, below which those that candidates are tried on are the same
MEAN = "mean"
ALIKE = "both sets give the same states there: the prompts do not differ where they are read."

Position = int | str  # from a prompt's end, or MEAN


class Sets(NamedTuple):
    """Prompts by what they are for."""

    fit: tuple[list[Prompt], list[Prompt]]  # positives and negatives that the direction is from
    select: tuple[list[Prompt], list[Prompt]]  # that candidates are tried on
    held: tuple[list[Prompt], list[Prompt]]  # that are only measured on
    apart: bool  # whether no prompt of `select` is in `fit`


@dataclass
class Extracted:
    """States, and what they say."""

    policy: Policy
    settings: Settings
    prefix: list[int]
    states: dict[Position, tuple[np.ndarray, np.ndarray]]  # float [n, 1 + blocks, d] of positives and negatives
    separations: dict[Position, list[Separation]]
    given: Direction | None = None  # --direction: its vectors are removed, and not those that the states give

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return next(iter(self.states.values()))[0].shape[1] - 1

    @property
    def meant(self) -> list[int]:
        """Blocks whose directions auto may take: those that a file is meant for, or all."""
        own = [block for block in self.given.about.blocks if block >= 0] if self.given else []
        return own or list(range(self.blocks))

    def sides(self, block: int, position: Position) -> tuple[np.ndarray, np.ndarray]:
        """States [n, d] and [m, d]."""
        positive, negative = self.states[position]
        return positive[:, block + 1], negative[:, block + 1]

    def raw(self, block: float, position: Position) -> np.ndarray:
        """The direction as it is extracted, not normalised, float64 [d]; of 2.5, between those of blocks 2 and 3."""
        if not float(block).is_integer():
            return between({b: self.raw(b, position) for b in neighbours(block)}, block)
        if self.given:
            return self.given.vectors[int(block)].astype(np.float64)
        return directions.extract(METHODS[self.settings.method], *self.sides(int(block), position))

    def removed(self, block: float, position: Position, target: int) -> np.ndarray:
        """Rows [k, d] that writers of block `target` lose where the direction is taken from `block`; k is 1 for 2.5."""
        if not float(block).is_integer():
            return between({b: self.removed(b, position, target)[0] for b in neighbours(block)}, block)[None]
        positive, negative = self.sides(int(block), position)
        if self.settings.rank > 1:
            return directions.subspace(positive, negative, self.settings.rank)
        vector = self.raw(block, position)
        if self.settings.variant == "projected":
            vector = directions.projected(vector, negative.mean(0, dtype=np.float64))
        if self.settings.variant == "biprojected":
            there = self.sides(target, position)[1].mean(0, dtype=np.float64)
            vector = directions.biprojected(vector, there)
        return vector[None]

    def by_block(self, block: float | None, position: Position) -> dict[int, np.ndarray]:
        """What every block's writers lose; block None: each its own direction, where `differs` says that it has one.

        UserError where none has.
        """
        there = [t for t in range(self.blocks) if block is not None or self.differs(t, position)]
        if not there:
            raise UserError(self.none)
        return {t: self.removed(t if block is None else block, position, t) for t in there}

    def direction(self, block: int | None, position: Position, data_hash: str, measured: dict[str, Any]) -> Direction:
        """All blocks' vectors at a position as a file keeps them, meant for the block that was chosen."""
        there = [b for b in range(-1, self.blocks) if self.differs(b, position)]
        baseline = {b: self.sides(b, position)[1].mean(0, dtype=np.float64) for b in there}
        median = {s.block: s.median_norm for s in self.separations[position] if s.block in there}
        settings, old = self.settings, self.given.about if self.given else None
        method = old.method if old else METHODS[settings.method]
        about = About(
            method=method + ("" if settings.variant == "plain" else f", {settings.variant}"),
            position="completion" if position == MEAN else str(position),
            operator="ablate",
            blocks=() if block is None else (block,),
            base_model=self.policy.name,
            base_hash=self.policy.base_hash,
            data_hash=old.data_hash if old else data_hash,
            template_prefix=tuple(self.prefix),
            measured=measured,
        )
        own = self.raw if settings.rank > 1 else lambda b, position: self.removed(b, position, b)[0]
        return Direction({b: own(b, position) for b in there}, about, baseline, median)

    def differs(self, block: float, position: Position) -> bool:
        """Whether there is a direction: the embeddings of a last token that all prompts share have none.

        Nor has a block behind them that sees no further than the template's end, as the convolutions of hybrids do.
        """
        if self.given:
            return all(b in self.given.vectors and self.given.vectors[b].any() for b in neighbours(block))
        sides = [self.sides(b, position) for b in neighbours(block)]
        return not any(directions.alike(a, b) for a, b in sides)

    @property
    def none(self) -> str:
        """Why a block has no direction."""
        return f"--direction {self.settings.direction} has no vector there." if self.given else ALIKE


def neighbours(block: float) -> list[int]:
    """The block, or the two that it lies between."""
    return sorted({math.floor(block), math.ceil(block)})


def between(rows: Mapping[int, np.ndarray], block: float) -> np.ndarray:
    """As `Direction.at` has it, float64 [d], at the length that lies as far between those of the two blocks."""
    low, high = neighbours(block)
    length = np.interp(block, (low, high), [float(np.linalg.norm(rows[b])) for b in (low, high)])
    return length * directions.interpolate(rows, block)


def given(policy: Policy, settings: Settings) -> tuple[Direction | None, Settings]:
    """The direction of --direction, if there is one, and the settings with the place that it is from and meant for.

    UserError for a file that cannot be used, or that is of another model.
    """
    if not settings.direction:
        return None, settings
    found, name = vectors.load(Path(settings.direction).expanduser()), f"--direction {settings.direction}"
    vectors.check(found, policy, name, force=None)
    about = found.about
    own = [str(block) for block in about.blocks if block >= 0]
    place = {"completion": MEAN, "unknown": "last"}.get(about.position, about.position)
    block = own[0] if settings.block == "auto" and len(own) == 1 else settings.block
    return found, replace(settings, position=place, block=block)


def as_asked(contrast: Contrast, settings: Settings) -> Contrast:
    """The sets as pairs where --paired says so. UserError for pairs that are none, and for a method that needs them."""
    if settings.paired:
        return pairs.as_pairs(contrast)
    if settings.method == "pca" and not contrast.paired:
        raise UserError(
            "--method pca takes differences of pairs, and nothing says that these sets are pairs: add --paired where "
            'line i of both belong together, give rows of {"positive", "negative"}, or use --method mean.'
        )
    return contrast


def split(contrast: Contrast, settings: Settings) -> Sets:
    """The prompts of both sets, shuffled by the seed (pairs stay pairs). UserError where a set is too small."""
    if contrast.positive_completions:
        raise UserError(
            "--positive: its rows have chosen and rejected completions of one prompt. Ablation needs prompts that "
            "bring the behaviour out and others that do not; for such rows there is mlx-realign steer extract."
        )
    rng = np.random.default_rng(settings.seed)
    sides, apart = [], True
    order: np.ndarray | None = None
    for name in ("positive", "negative"):
        prompts: list[Prompt] = getattr(contrast, name)
        if len(prompts) < 4:
            told = "".join(f" ({note})" for note in contrast.notes)
            raise UserError(
                f"--{name}: {len(prompts)} prompts are too few{told}: give 4 at the least, 100 or more are good."
            )
        order = order if contrast.paired and order is not None else rng.permutation(len(prompts))
        held = max(1, round(settings.held_out * len(prompts)))
        rest = [prompts[i] for i in order[held:]]
        tried = min(settings.select_prompts, len(rest) // 3)
        enough = len(rest) - tried >= LEAST
        apart = apart and enough
        fit = rest[tried:] if enough else rest
        select = rest[: tried if enough else settings.select_prompts]
        sides.append((fit[: settings.limit], select, [prompts[i] for i in order[:held]][: settings.eval_limit]))
    fit, select, held = zip(*sides, strict=True)
    return Sets(fit, select, held, apart)


def extract(
    policy: Policy,
    sets: Sets,
    settings: Settings,
    *,
    paired: bool,
    say: Callable[[str], None],
    given: Direction | None = None,
) -> Extracted:
    """States of the prompts that the direction is from, and how well they are told apart.

    given: a direction that is there already; states are then taken where its own were.
    """
    prefix = list(given.about.template_prefix) if given else []
    if settings.prefix and (given is None or given.about.position == "unknown"):
        say("what all completions begin with")
        prefix = capture.response_prefix(policy, *sets.fit)
    asked = [capture.encode(policy, side, prefix=prefix) for side in sets.fit]
    positions = positions_of(settings, asked)
    found: dict[Position, tuple[np.ndarray, np.ndarray]] = {}
    numbers = [p for p in positions if isinstance(p, int)]
    if numbers:
        say(f"states of {len(asked[0])} positive and {len(asked[1])} negative prompts")
        sides = [capture.collect(policy, side, positions=numbers) for side in asked]
        found |= {p: (sides[0][:, :, i], sides[1][:, :, i]) for i, p in enumerate(numbers)}
    if MEAN in positions:
        say("states of completions")
        most = COMPLETED if settings.position == "auto" else settings.limit
        sides = [_of_completions(policy, side[:most], settings) for side in asked]
        found[MEAN] = sides[0], sides[1]
    if settings.winsorise < 1:
        found = {p: (_clamped(a, settings.winsorise), _clamped(b, settings.winsorise)) for p, (a, b) in found.items()}
    say("how well the sets are told apart")
    blocks = list(range(-1, next(iter(found.values()))[0].shape[1] - 1))
    told = {p: steerability.report(a, b, blocks, paired=paired and len(a) == len(b)) for p, (a, b) in found.items()}
    return Extracted(policy, settings, prefix, found, told, given)


def positions_of(settings: Settings, asked: Sequence[Sequence[Sequence[int]]]) -> list[Position]:
    """Where states are read: as asked, or the tokens that all prompts end with (a template's), and completions."""
    if settings.position != "auto":
        position = position_of(settings.position)
        return [MEAN if position is None else position]
    texts = [list(prompt) for side in asked for prompt in side]
    alike = 0
    while alike < min(GRID, min(map(len, texts)) - 1) and len({text[-1 - alike] for text in texts}) == 1:
        alike += 1
    return [*range(-1, -max(alike, 1) - 1, -1), MEAN]


def _of_completions(policy: Policy, asked: list[list[int]], settings: Settings) -> np.ndarray:
    sampling = Sampling(max_new_tokens=min(settings.max_new_tokens, 64), temperature=0.0)
    made = rollout.rollout(policy, asked, sampling, rows=settings.batch_size)
    return capture.completion_means(policy, asked, [one.tokens.tolist() for [one] in made])


def _clamped(states: np.ndarray, quantile: float) -> np.ndarray:
    return directions.winsorise(states, quantile).astype(np.float32)
