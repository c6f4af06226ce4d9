# SPDX-License-Identifier: Apache-2.0
"""Whether two sets of prompts carry a direction at all, and where: looked at before anything is generated.

Agreement of the pairs and separability foretell how well steering works (arXiv:2505.22637). Both are measured on
prompts that the direction was not fitted on: in hundreds of dimensions any two sets are separable by hindsight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from . import noise
from .directions import alike, mean_difference, settled
from .errors import UserError
from .intervals import Interval, Z

SPLITS = 64  # into random halves
FEW = 16  # prompts of a set, below which a direction is mostly those prompts
WEAK_AUROC, WEAK_PAIRS, WEAK_HALVES = 0.7, 0.1, 0.5
EARLY = 0.8  # share of the blocks: in later ones directions are of tokens, not of behaviour (arXiv:2406.11717)


@dataclass(frozen=True)
class Separation:
    """How a block's mean difference separates the sets."""

    block: int
    norm: float  # length of the mean difference, in units of the residual stream
    median_norm: float  # of the states of both sets
    paired: bool
    agreement: Interval  # paired: cosine of a pair's difference and the mean of the others'; else of random halves'
    d_prime: float  # distance of the means over the pooled standard deviation, held out; NaN: too few prompts
    auroc: Interval  # held out
    positives: int
    negatives: int

    @property
    def share(self) -> float:
        """Length of the mean difference as a share of the median residual norm."""
        return self.norm / self.median_norm if self.median_norm else math.nan


class Halves(NamedTuple):
    """Row indices of both halves of a set."""

    one: np.ndarray
    other: np.ndarray


class Split(NamedTuple):
    """1 or -1, the half a prompt is in, for each prompt of both sets."""

    positive: np.ndarray
    negative: np.ndarray


def report(
    positive: np.ndarray, negative: np.ndarray, blocks: Sequence[int], *, paired: bool = False, seed: int = 0
) -> list[Separation]:
    """One Separation per block, from states [n, len(blocks), d] and [m, len(blocks), d] of any float dtype.

    paired: the i-th of both belong together. d' and AUROC: both sets are cut in halves by `seed`, each half is measured
    along the mean difference of the other, and the two numbers are averaged; the interval is that of one half.
    UserError for sets that are no pairs.
    """
    if positive.shape[1:] != negative.shape[1:] or positive.ndim != 3 or positive.shape[1] != len(blocks):
        raise ValueError(f"states must be [n, {len(blocks)}, d], not {positive.shape} and {negative.shape}")
    if paired and len(positive) != len(negative):
        raise UserError(f"{len(positive)} positive and {len(negative)} negative prompts are no pairs.")
    rng = np.random.default_rng(seed)
    ahead = _halves(len(positive), rng)
    behind = ahead if paired else _halves(len(negative), rng)
    splits = [Split(_signs(len(positive), rng), _signs(len(negative), rng)) for _ in range(SPLITS)]
    found = []
    for i, block in enumerate(blocks):
        p, n = settled(positive[:, i], negative[:, i])
        apart, area = _held_out(p, n, ahead, behind)
        median = float(np.median(np.linalg.norm(np.concatenate([positive[:, i], negative[:, i]]), axis=1)))
        agreement = pair_agreement(_gaps(p, n)) if paired else _half_agreement(p, n, splits)
        norm = 0.0 if alike(p, n) else float(np.linalg.norm(mean_difference(p, n)))
        found.append(Separation(block, norm, median, paired, agreement, apart, area, len(p), len(n)))
    return found


def best(separations: Sequence[Separation]) -> int:
    """The block to use where nobody says: that of `at_best`."""
    return at_best(separations).block


def at_best(separations: Sequence[Separation]) -> Separation:
    """The one with the largest held-out d' among the first four fifths of the blocks.

    The last one is taken only where there is no other, embeddings where there is no block. Late blocks separate
    well, by the token that comes next; what acts there comes too late to change the answer.
    """
    depth = max(s.block for s in separations) + 1
    blocks = [s for s in separations if s.block >= 0] or list(separations)
    early = [s for s in blocks if s.block < min(EARLY * depth, depth - 1)] or blocks
    return max(early, key=apart)


def apart(s: Separation) -> tuple[float, float]:
    """What is large where the sets are told apart well."""
    return (-math.inf if math.isnan(s.d_prime) else s.d_prime, s.share)


def warn(separations: Sequence[Separation]) -> str | None:
    """One line where the prompts cannot carry a direction, with the numbers that say so; None where they can."""
    s = at_best(separations)
    reasons = []
    if min(s.positives, s.negatives) < FEW:
        reasons.append(f"few prompts ({s.positives} positive, {s.negatives} negative; {FEW} of each are the least)")
    # The block was picked among many: its interval has to hold for all of them at once (Bonferroni).
    wide = NormalDist().inv_cdf(1 - 0.025 / len(separations))
    lowest = mann_whitney(s.auroc.value, s.positives // 2, s.negatives // 2, wide).low
    measured = f"held-out AUROC {_said(s.auroc)}"
    if math.isnan(s.auroc.value):
        reasons.append("too few to hold any out")
    elif not lowest > 0.5:
        reasons.append(f"{measured} is no more than chance gives the best of {len(separations)} blocks")
    elif s.auroc.value < WEAK_AUROC:
        reasons.append(f"{measured} is below {WEAK_AUROC}")
    what, least = ("pairs", WEAK_PAIRS) if s.paired else ("random halves", WEAK_HALVES)
    if s.agreement.value < least or (s.agreement.low <= 0 and not math.isnan(s.agreement.value)):
        reasons.append(f"{what} agree little on it: cosine {_said(s.agreement)}, {least} is the least")
    if not reasons:
        return None
    said = "; ".join(reasons)
    return f"these prompts hardly carry a direction (best block {s.block}): {said}. More and clearer ones help."


def summary(separations: Sequence[Separation]) -> dict[str, Any]:
    """The best block in plain values, as a direction's file keeps it (`About.measured`)."""
    s = at_best(separations)
    plain = lambda x: round(x, 4) if math.isfinite(x) else None  # noqa: E731
    return {
        "best_block": s.block,
        "share_of_median_norm": plain(s.share),
        "pair_agreement" if s.paired else "half_agreement": [plain(x) for x in s.agreement],
        "d_prime": plain(s.d_prime),
        "auroc": [plain(x) for x in s.auroc],
        "prompts": [s.positives, s.negatives],
    }


# ------------------------------------------------------------------ numbers


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Chance that a positive's score [n] is above a negative's [m], ties half: the area under the ROC curve."""
    ordered = np.sort(negative)
    below, not_above = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
    return float((below + not_above).mean() / (2 * len(ordered)))


def mann_whitney(value: float, positives: int, negatives: int, z: float = Z) -> Interval:
    """An AUROC with the interval of Newcombe's method 5 (2006, Stat. Med. 25:559): all t with |value - t| <= z SD(t).

    SD is that of Hanley and McNeil (1982, Radiology 143:29), with the two counts at their mean in the numerator. Unlike
    theirs at the estimate, the interval has a width where the sets are separated without an error.
    """
    if math.isnan(value):
        return Interval(math.nan, 0.0, 1.0)
    more = (positives + negatives) / 2 - 1

    def inside(t: float) -> bool:
        spread = 1 + more * ((1 - t) / (2 - t) + t / (1 + t))
        return (value - t) ** 2 <= z * z * t * (1 - t) * spread / (positives * negatives)

    def edge(out: float) -> float:
        kept = value
        for _ in range(60):
            middle = (kept + out) / 2
            kept, out = (middle, out) if inside(middle) else (kept, middle)
        return kept

    return Interval(value, 0.0 if value == 0 else edge(0.0), 1.0 if value == 1 else edge(1.0))


def d_prime(positive: np.ndarray, negative: np.ndarray) -> float:
    """(mean - mean) / sqrt of the mean of both variances (n - 1) of scores [n] and [m]; NaN below two of a set."""
    if min(len(positive), len(negative)) < 2:
        return math.nan
    spread = math.sqrt((positive.var(ddof=1) + negative.var(ddof=1)) / 2)
    apart = float(positive.mean() - negative.mean())
    return apart / spread if spread else math.copysign(math.inf, apart) if apart else 0.0


def pair_agreement(differences: np.ndarray) -> Interval:
    """Mean cosine of each difference [n, d] and the mean of the others, with a 95% interval over pairs.

    Without the others alone, a pair would agree with itself: two random ones by 0.7.
    """
    count = len(differences)
    if count < 2:
        return Interval(math.nan, -1.0, 1.0)
    cosines = _cosines(differences, differences.sum(0) - differences)
    half = Z * float(cosines.std(ddof=1)) / math.sqrt(count)
    middle = float(cosines.mean())
    return Interval(middle, max(-1.0, middle - half), min(1.0, middle + half))


def _half_agreement(positive: np.ndarray, negative: np.ndarray, splits: Sequence[Split]) -> Interval:
    """Cosine of the mean differences of two random halves: mean over splits and where 95% of them lie."""
    if min(len(positive), len(negative)) < 2:
        return Interval(math.nan, -1.0, 1.0)
    sides = []
    for sign in (1, -1):
        kept = [np.stack([one[which] == sign for one in splits]).astype(float) for which in (0, 1)]
        means = [(k @ x) / k.sum(1, keepdims=True) for k, x in zip(kept, (positive, negative), strict=True)]
        sides.append(means[0] - means[1])
    cosines = _cosines(*sides)
    low, high = np.quantile(cosines, [0.025, 0.975])
    return Interval(float(cosines.mean()), float(low), float(high))


def _held_out(positive: np.ndarray, negative: np.ndarray, ahead: Halves, behind: Halves) -> tuple[float, Interval]:
    """d' and AUROC of each half along the mean difference of the other, averaged.

    Both hang on the product of the two mean differences, so together they are as sure as one of them.
    """
    counts = len(positive) // 2, len(negative) // 2
    if not all(counts):
        return math.nan, mann_whitney(math.nan, *counts)
    apart, areas = [], []
    for fit, test in ((0, 1), (1, 0)):
        direction = positive[ahead[fit]].mean(0) - negative[behind[fit]].mean(0)
        scores = positive[ahead[test]] @ direction, negative[behind[test]] @ direction
        apart.append(d_prime(*scores))
        areas.append(auroc(*scores))
    return float(np.mean(apart)), mann_whitney(float(np.mean(areas)), *counts)


def _gaps(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """positive - negative [n, d], rows of zeros for pairs that differ by rounding alone."""
    gaps, rounding = positive - negative, noise.of(positive, negative)
    return np.stack([np.zeros_like(gap) if noise.only(gap, rounding) else gap for gap in gaps])


def _halves(count: int, rng: np.random.Generator) -> Halves:
    order = rng.permutation(count)
    return Halves(order[: count // 2], order[count // 2 :])


def _signs(count: int, rng: np.random.Generator) -> np.ndarray:
    """1 for one random half, -1 for the other."""
    signs = np.ones(count)
    signs[_halves(count, rng).one] = -1
    return signs


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of rows [n, d] with rows, [n]; 0 where one of them is zero."""
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return np.divide((one * other).sum(1), lengths, out=np.zeros(len(one)), where=lengths > 0)


# ------------------------------------------------------------------ for people


def table(separations: Sequence[Separation]) -> Table:
    """One line per block for the terminal, the best one marked."""
    at = best(separations)
    shown = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)  # within 80 columns
    agree = "pairs agree" if separations[0].paired else "halves agree"
    for name in ("block", "norm", "of median", agree, "d'", "AUROC"):
        shown.add_column(name, justify="right", no_wrap=True)
    for s in separations:
        apart = "-" if math.isnan(s.d_prime) else f"{s.d_prime:.2f}"
        numbers = (f"{s.norm:.3g}", f"{s.share:.1%}", _said(s.agreement), apart, _said(s.auroc))
        mark = "> " if s.block == at else ""
        shown.add_row(f"{mark}{s.block}", *numbers, style="bold" if mark else "")
    return shown


def line(separations: Sequence[Separation]) -> str:
    """The best block in words."""
    s = at_best(separations)
    agree = "pairs agree" if s.paired else "halves agree"
    return f"block {s.block} best, {agree} {_said(s.agreement)}, d' {s.d_prime:.2f}, AUROC {_said(s.auroc)}"


def plot(separations: Sequence[Separation], path: str | Path) -> None:
    """AUROC, d', agreement and length over the blocks, as an image; the file's ending says which kind.

    UserError where matplotlib is not installed or does not know the ending.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'mlx-realign[plots]'") from None
    blocks, at = [s.block for s in separations], best(separations)
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes: Any = figure.subplots(2, 2, sharex=True)
    agree = "cosine of a pair and the others" if separations[0].paired else "cosine of random halves"
    panels = (
        ("AUROC, held out", [s.auroc for s in separations], 0.5),
        (agree, [s.agreement for s in separations], 0.0),
        ("d', held out", [s.d_prime for s in separations], 0.0),
        ("length, share of the median norm", [s.share for s in separations], 0.0),
    )
    for axis, (name, values, chance) in zip(axes.flat, panels, strict=True):
        middle = [v.value if isinstance(v, Interval) else v for v in values]
        bounds = [(v.low, v.high) for v in values if isinstance(v, Interval)]
        if bounds:
            axis.fill_between(blocks, *zip(*bounds, strict=True), alpha=0.2)
        axis.plot(blocks, middle, marker="o", markersize=3)
        axis.axhline(chance, color="grey", linewidth=0.8)
        axis.axvline(at, color="grey", linewidth=0.8, linestyle=":")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(name, fontsize=10)
    for axis in axes[1]:
        axis.set_xlabel(f"block (best: {at})")
    try:
        figure.savefig(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _said(interval: Interval) -> str:
    """-: too few prompts to say."""
    return "-" if math.isnan(interval.value) else f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"
