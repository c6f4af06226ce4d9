# SPDX-License-Identifier: Apache-2.0
"""Prompts -> directions of every block at the positions where they may be read, and how well each separates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import capture, directions, fingerprint, rollout, steerability
from ..errors import UserError
from ..policy import Policy
from ..sampling import Sampling
from ..steerability import Separation
from ..steering.extract import METHODS, position_of
from ..steering.pairs import Contrast, Prompt
from ..vectors import About, Direction
from .settings import Settings

GRID = 5  # positions of a template's end that are looked at
COMPLETED = 64  # prompts of a set whose completions are made where nobody asked for them
LEAST = 32  # prompts of a set for the direction, below which those that candidates are tried on are the same
MEAN = "mean"

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

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return next(iter(self.states.values()))[0].shape[1] - 1

    def sides(self, block: int, position: Position) -> tuple[np.ndarray, np.ndarray]:
        """States [n, d] and [m, d]."""
        positive, negative = self.states[position]
        return positive[:, block + 1], negative[:, block + 1]

    def raw(self, block: int, position: Position) -> np.ndarray:
        """The direction as it is extracted, not normalised, float64 [d]."""
        return directions.extract(METHODS[self.settings.method], *self.sides(block, position))

    def removed(self, block: int, position: Position, target: int) -> np.ndarray:
        """Rows [k, d] that writers of block `target` lose where the direction is taken from `block`."""
        positive, negative = self.sides(block, position)
        if self.settings.rank > 1:
            return directions.subspace(positive, negative, self.settings.rank)
        vector = self.raw(block, position)
        if self.settings.variant == "projected":
            vector = directions.projected(vector, negative.mean(0, dtype=np.float64))
        if self.settings.variant == "biprojected":
            there = self.sides(target, position)[1].mean(0, dtype=np.float64)
            vector = directions.biprojected(vector, there)
        return vector[None]

    def by_block(self, block: int | None, position: Position) -> dict[int, np.ndarray]:
        """What every block's writers lose; block None: each its own direction."""
        return {t: self.removed(t if block is None else block, position, t) for t in range(self.blocks)}

    def direction(self, block: int | None, position: Position, data_hash: str, measured: dict[str, Any]) -> Direction:
        """All blocks' vectors at a position as a file keeps them, meant for the block that was chosen."""
        there = [b for b in range(-1, self.blocks) if self.differs(b, position)]
        baseline = {b: self.sides(b, position)[1].mean(0, dtype=np.float64) for b in there}
        median = {s.block: s.median_norm for s in self.separations[position] if s.block in there}
        settings = self.settings
        about = About(
            method=METHODS[settings.method] + ("" if settings.variant == "plain" else f", {settings.variant}"),
            position="completion" if position == MEAN else str(position),
            operator="ablate",
            blocks=() if block is None else (block,),
            base_model=self.policy.name,
            base_hash=fingerprint.base(self.policy.model),
            data_hash=data_hash,
            template_prefix=tuple(self.prefix),
            measured=measured,
        )
        own = self.raw if settings.rank > 1 else lambda b, position: self.removed(b, position, b)[0]
        return Direction({b: own(b, position) for b in there}, about, baseline, median)

    def differs(self, block: int, position: Position) -> bool:
        """Whether there is a direction: the embeddings of a last token that all prompts share have none."""
        positive, negative = self.sides(block, position)
        return bool((positive.mean(0, dtype=np.float64) - negative.mean(0, dtype=np.float64)).any())


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


def extract(policy: Policy, sets: Sets, settings: Settings, *, paired: bool, say: Callable[[str], None]) -> Extracted:
    """States of the prompts that the direction is from, and how well they are told apart."""
    prefix: list[int] = []
    if settings.prefix:
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
    return Extracted(policy, settings, prefix, found, told)


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
