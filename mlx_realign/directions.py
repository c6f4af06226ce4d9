# SPDX-License-Identifier: Apache-2.0
"""From the hidden states of two sets of prompts to the direction between them. NumPy, float64.

`positive` [n, d] are states of prompts (or completions) that show the behaviour, `negative` [m, d] of those that do
not: one block, one position. `mean_difference` is the default: it found a planted shift with cosine 0.995 where the
first component of centred differences found it with 0.01.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np

from . import noise
from .errors import UserError
from .flags import nearest

Variant = Literal["uncentred", "centred", "pair_centred"]
ITERATIONS, TOLERANCE = 100, 1e-10  # of Newton's method; gradient relative to its size at the start


# ------------------------------------------------------------------ methods


def mean_difference(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """mean(positive) - mean(negative), float64 [d], in units of the states. CAA, arXiv:2312.06681."""
    positive, negative = _checked(positive, negative)
    return positive.mean(0) - negative.mean(0)


def alike(positive: np.ndarray, negative: np.ndarray) -> bool:
    """Whether the means of both sets differ by rounding of the states alone (`noise`): then there is no direction."""
    return noise.only(mean_difference(positive, negative), noise.of(*_checked(positive, negative)))


def settled(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets [n, d] and [m, d], float64; zeros where all states are the same but for rounding.

    For what does not change when all states are moved alike, and would find order in the rounding.
    """
    positive, negative = _checked(positive, negative)
    every = np.concatenate([positive, negative])
    if not noise.only(every - every.mean(0), noise.of(every)):
        return positive, negative
    return np.zeros_like(positive), np.zeros_like(negative)


def pca(positive: np.ndarray, negative: np.ndarray, *, variant: Variant = "uncentred") -> np.ndarray:
    """First principal component of the differences positive[i] - negative[i], unit float64 [d]; positives are higher.

    uncentred: of the differences as they are. RepE, arXiv:2310.01405.
    centred: their mean taken off first, which deletes what all pairs have in common, the behaviour included: unsafe,
    here to repeat what `pca_diff` of repeng 0.4 gives. pair_centred: of both sides minus the middle of their pair,
    repeng's `pca_center`; it is `uncentred` but for the sign. Signs: by the mean projection, and for the two variants
    of repeng by the majority of pairs, as there. UserError where the sets are not pairs.
    """
    if variant not in get_args(Variant):
        raise UserError(f"pca has no variant {variant!r}.{nearest(variant, get_args(Variant))}")
    positive, negative = _checked(positive, negative)
    if len(positive) != len(negative):
        raise UserError(
            f"pca needs pairs, and there are {len(positive)} positive and {len(negative)} negative prompts. "
            "Give as many of both, line by line, or use mean_difference, logistic or lda."
        )
    differences = positive - negative
    found = _first_component(differences - differences.mean(0) if variant == "centred" else differences)
    along = differences @ found
    higher = along.mean() if variant == "uncentred" else np.sign(along).sum()
    return -found if higher < 0 else found


def logistic(positive: np.ndarray, negative: np.ndarray, *, l2: float = 1.0) -> np.ndarray:
    """Normal of the plane that logistic regression puts between the sets, unit float64 [d].

    Minimises sum log(1 + exp(-y (w.x / s + b))) + l2 / 2 |w|^2, the plane's b free. s, the root mean square of the
    states about the mean of their set, makes l2 a number without a unit: 1 / C of scikit-learn for states / s.
    """
    positive, negative = _checked(positive, negative)
    if not l2 > 0:
        raise UserError(f"logistic: l2 is {l2:g}, expected a number above 0 (sets that a plane separates need it).")
    residuals = _residuals(positive, negative)
    flat = noise.only(residuals, noise.of(positive, negative))
    scale = 1.0 if flat else float(np.sqrt(np.mean(residuals**2)))
    states = np.concatenate([positive, negative]) / scale
    # The penalty does not see rotations, and w lies in the span of the states: solve in coordinates of that span.
    basis, coordinates = np.linalg.qr((states - states.mean(0)).T)
    labels = np.repeat([1.0, -1.0], [len(positive), len(negative)])
    return unit(basis @ _newton(coordinates.T, labels, l2))


def lda(positive: np.ndarray, negative: np.ndarray, *, shrinkage: float | None = None) -> np.ndarray:
    """S^-1 (mean(positive) - mean(negative)), unit float64 [d], S the covariance within the sets, pooled.

    S = (1 - shrinkage) R^T R / (n + m) + shrinkage * (mean variance) I, with R the states minus the mean of their set.
    shrinkage None: as Ledoit and Wolf estimate it (2004, J. Multivariate Anal. 88:365).
    """
    positive, negative = _checked(positive, negative)
    difference, residuals = positive.mean(0) - negative.mean(0), _residuals(positive, negative)
    count, width = residuals.shape
    if shrinkage is None:
        shrinkage = ledoit_wolf(residuals)
    if not 0 <= shrinkage <= 1:
        raise UserError(f"lda: shrinkage is {shrinkage:g}, expected a number from 0 to 1.")
    ridge = shrinkage * float(np.mean(residuals**2))
    share = (1 - shrinkage) / count
    flat = noise.only(residuals, noise.of(positive, negative))
    if flat or share == 0:  # a covariance that is no direction's, or the same in all
        return unit(difference)
    if ridge == 0 and count - 2 < width:
        raise UserError(
            f"lda: without shrinkage {width} dimensions need more than {width + 1} prompts, and there are {count}. "
            "Leave shrinkage to its estimate, or set it above 0."
        )
    if count >= width:
        return unit(np.linalg.solve(share * residuals.T @ residuals + ridge * np.eye(width), difference))
    inner = residuals @ residuals.T + ridge / share * np.eye(count)  # Woodbury: rows are fewer than dimensions
    return unit(difference - residuals.T @ np.linalg.solve(inner, residuals @ difference))


METHODS: dict[str, Callable[..., np.ndarray]] = {f.__name__: f for f in (mean_difference, pca, logistic, lda)}


def extract(method: str, positive: np.ndarray, negative: np.ndarray, **options: Any) -> np.ndarray:
    """The direction by the method of that name, float64 [d], in units of the states.

    A method that gives a unit vector has it scaled to how far apart the means of the sets are along it, so that adding
    it once moves the mean of the negatives as far along as the positives'. All zero where both sets are `alike`.
    UserError for an unknown method or option.
    """
    name = method.replace("-", "_")
    if name not in METHODS:
        raise UserError(f"no method {method!r} of extraction.{nearest(name, METHODS)} There are {', '.join(METHODS)}.")
    known = list(inspect.signature(METHODS[name]).parameters)[2:]
    for option in options:
        if option not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise UserError(f"{name} has no option {option!r}.{nearest(option, known)} ({takes})")
    if alike(positive, negative):
        return np.zeros(np.shape(positive)[-1])
    found = METHODS[name](positive, negative, **options)
    if name == "mean_difference":
        return found
    return found * abs(float(found @ mean_difference(positive, negative)))


# ------------------------------------------------------------------ after extraction


def projected(direction: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """`direction` without its component along `baseline` (the mean of the negatives), float64 [d].

    What an edit along it removes is then nothing that states without the behaviour are made of. In two passes, which
    leave no more than rounding. UserError where nothing is left.
    """
    direction, baseline = np.asarray(direction, np.float64), np.asarray(baseline, np.float64)
    length = float(np.linalg.norm(baseline))
    if length == 0:
        return direction
    along = baseline / length
    found = direction - (direction @ along) * along
    found = found - (found @ along) * along
    if np.linalg.norm(found) <= 1e-6 * np.linalg.norm(direction):  # as far as float32 tells
        raise UserError("the direction is that of the baseline: nothing is left of it. Use the plain direction.")
    return found


def biprojected(direction: np.ndarray, baseline_at_target: np.ndarray) -> np.ndarray:
    """`projected` for a direction that is used in another block than its own: length kept, float64 [d].

    baseline_at_target: mean of the negatives in the block where it will be used.
    """
    found = projected(direction, baseline_at_target)
    return found * (np.linalg.norm(direction) / np.linalg.norm(found))


def subspace(positive: np.ndarray, negative: np.ndarray, k: int) -> np.ndarray:
    """k directions, orthonormal rows float64 [k, d], of a behaviour that is more than one.

    The first is the unit mean difference. The others, at right angles to it, are those along which positives scatter
    most beyond negatives: eigenvectors of the difference of the covariances (contrastive PCA, Abid et al. 2018, Nat.
    Commun. 9:2134), so that what varies in both sets alike, topics say, is not among them. UserError where there are
    fewer than k.
    """
    positive, negative = _checked(positive, negative)
    first = unit(positive.mean(0) - negative.mean(0))
    sides = [x - x.mean(0) for x in (positive, negative)]
    sides = [x - np.outer(x @ first, first) for x in sides]
    basis = np.linalg.qr(np.concatenate(sides).T)[0]
    over, under = ((x @ basis).T @ (x @ basis) / len(x) for x in sides)
    values, vectors = np.linalg.eigh(over - under)
    order = np.argsort(-values)
    most = 1 + int((values > 1e-9 * np.abs(values).max()).sum())
    if not 1 <= k <= most:
        raise UserError(f"a subspace of {k} directions: these prompts carry 1 to {most}. Ask for fewer, or give more.")
    rest = (basis @ vectors[:, order[: k - 1]]).T
    rows = np.concatenate([first[None], rest - np.outer(rest @ first, first)])
    return np.concatenate([first[None], np.linalg.qr(rows.T)[0].T[1:]])


def winsorise(states: np.ndarray, quantile: float) -> np.ndarray:
    """Each state [..., d] clamped to the quantile (0 to 1] of its own absolute entries, float64; 1 changes nothing.

    For models in which a few dimensions are hundreds of times larger than the others.
    """
    if not 0 < quantile <= 1:
        raise UserError(f"winsorise: quantile is {quantile:g}, expected above 0 and at most 1 (0.995, say; 1 is off).")
    states = np.asarray(states, np.float64)
    limit = np.quantile(np.abs(states), quantile, axis=-1, keepdims=True)
    return np.clip(states, -limit, limit)


def interpolate(vectors: Mapping[int, np.ndarray], at: float) -> np.ndarray:
    """Unit float64 [d] between blocks: at = 12.25 is three parts of block 12's unit vector and one of block 13's.

    vectors: block -> [d]. UserError where one of the two blocks is not there.
    """
    low = int(np.floor(at))
    share = at - low
    needed = [low, low + 1] if share else [low]
    if missing := [block for block in needed if block not in vectors]:
        there = f"{min(vectors)} to {max(vectors)}" if vectors else "none"
        raise UserError(f"no direction of block {missing[0]}, which {at:g} needs: there are {there}.")
    units = [unit(vectors[block]) for block in needed]
    return units[0] if not share else unit((1 - share) * units[0] + share * units[1])


def unit(vector: np.ndarray) -> np.ndarray:
    """Of length 1, float64 [d]. UserError for a vector of zeros or one that is not finite."""
    vector = np.asarray(vector, np.float64)
    length = float(np.linalg.norm(vector))
    if not 0 < length < np.inf:
        why = "it is zero: both sets of prompts look the same there" if length == 0 else "it is not finite"
        raise UserError(f"a direction has no unit vector: {why}. Use another block, or more different prompts.")
    return vector / length


def ledoit_wolf(residuals: np.ndarray) -> float:
    """Weight, 0 to 1, of (mean variance) I in the estimate of a covariance; residuals float64 [n, d], centred.

    From sums over pairs of rows, so nothing of size [d, d] is made.
    """
    count, width = residuals.shape
    squares = (residuals**2).sum(1)
    variance = float(squares.sum()) / (count * width)
    size = float(((residuals @ residuals.T) ** 2).sum()) / count**2  # |S|^2
    noise = (float((squares**2).sum()) / count - size) / (width * count)
    spread = size / width - variance**2  # |S - variance I|^2 / d
    if noise <= 0:
        return 0.0
    return min(1.0, noise / spread) if spread > 0 else 1.0


# ------------------------------------------------------------------ inside


def _checked(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [n, d] and [m, d]."""
    positive, negative = np.asarray(positive, np.float64), np.asarray(negative, np.float64)
    if positive.ndim != 2 or negative.ndim != 2 or positive.shape[1] != negative.shape[1]:
        raise ValueError(f"states must be [n, d] and [m, d], not {positive.shape} and {negative.shape}")
    if not len(positive) or not len(negative):
        raise UserError("a direction needs at least one positive and one negative prompt.")
    if not (np.isfinite(positive).all() and np.isfinite(negative).all()):
        raise UserError("hidden states are not finite: the model overflows in its dtype. Load it with --dtype float32.")
    return positive, negative


def _residuals(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Each state minus the mean of its set, [n + m, d]."""
    return np.concatenate([positive - positive.mean(0), negative - negative.mean(0)])


def _first_component(rows: np.ndarray) -> np.ndarray:
    """Right singular vector of the largest singular value, unit [d], by way of the smaller Gram matrix."""
    if len(rows) < rows.shape[1]:
        return unit(rows.T @ np.linalg.eigh(rows @ rows.T)[1][:, -1])
    return unit(rows.T @ (rows @ np.linalg.eigh(rows.T @ rows)[1][:, -1]))


def _newton(x: np.ndarray, y: np.ndarray, l2: float) -> np.ndarray:
    """Weights [k] of the logistic regression of y (1 or -1) [n] on x [n, k], an intercept not penalised."""
    x = np.concatenate([x, np.ones((len(x), 1))], 1)
    penalty = np.append(np.full(x.shape[1] - 1, l2), 0.0)
    weights = np.zeros(x.shape[1])

    def loss(w: np.ndarray) -> float:
        return float(np.logaddexp(0, -y * (x @ w)).sum() + (penalty * w**2).sum() / 2)

    start = None
    for _ in range(ITERATIONS):
        wrong = 1 / (1 + np.exp(np.clip(y * (x @ weights), -700, 700)))  # 1 - the probability of the right side
        gradient = penalty * weights - x.T @ (y * wrong)
        start = start or float(np.linalg.norm(gradient))
        if np.linalg.norm(gradient) <= TOLERANCE * start:
            break
        curvature = (x.T * (wrong * (1 - wrong))) @ x + np.diag(penalty)
        curvature[-1, -1] += 1e-12  # of the intercept, where every state is far from the plane
        step, now, size = np.linalg.solve(curvature, gradient), loss(weights), 1.0
        while size > 1e-6 and loss(weights - size * step) > now - 1e-4 * size * float(gradient @ step):
            size /= 2
        if size <= 1e-6:  # as low as float64 tells
            break
        weights = weights - size * step
    return weights[:-1]
