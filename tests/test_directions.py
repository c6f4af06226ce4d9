# SPDX-License-Identifier: Apache-2.0
"""Directions against planted ones, NumPy's own decompositions and scikit-learn 1.9.1."""

import numpy as np
import pytest

from mlx_realign import directions
from mlx_realign.directions import extract, lda, logistic, mean_difference, pca, projected, subspace, unit
from mlx_realign.errors import UserError


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def sets(n: int, m: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two clouds, correlated within, apart by (1, 0.5, 0 ...)."""
    rng = np.random.default_rng(seed)
    mix = np.eye(width) + 0.3 * rng.standard_normal((width, width))
    positive, negative = (rng.standard_normal((count, width)) @ mix for count in (n, m))
    positive[:, :2] += (1.0, 0.5)
    return positive, negative


def test_the_mean_difference_by_hand_and_in_float64():
    positive, negative = np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([[1.0, 1.0], [1.0, 1.0], [4.0, 1.0]])
    assert mean_difference(positive, negative).tolist() == [0.0, 3.0]
    # 4097 states of 4096.25 in float32: summed in that precision they are off by more than the difference
    high = np.full((4097, 1), 4096.25, np.float32)
    assert mean_difference(high + np.float32(0.001), high)[0] == float(np.float32(4096.251) - np.float32(4096.25))


def test_a_planted_shift_is_found_by_the_mean_and_lost_by_centring():
    rng = np.random.default_rng(0)
    positive, negative = 0.1 * rng.standard_normal((2, 300, 64))
    shift, nuisance = np.eye(64)[:2]
    positive = positive + shift + rng.choice([-1.5, 1.5], (300, 1)) * nuisance
    assert cosine(mean_difference(positive, negative), shift) > 0.99
    assert abs(pca(positive, negative, variant="centred") @ shift) < 0.1
    without = positive - np.outer(positive @ nuisance, nuisance)
    assert pca(without, negative) @ shift > 0.99
    assert abs(pca(without, negative, variant="centred") @ shift) < 0.3


@pytest.mark.parametrize("width", [7, 90])  # fewer and more dimensions than pairs
def test_components_are_those_of_numpys_svd(width: int):
    positive, negative = sets(40, 40, width)
    differences = positive - negative
    for variant, rows in (("uncentred", differences), ("centred", differences - differences.mean(0))):
        first = np.linalg.svd(rows)[2][0]
        assert abs(pca(positive, negative, variant=variant) @ first) == pytest.approx(1, abs=1e-12)  # pyright: ignore
    middles = (positive + negative) / 2
    both = np.concatenate([positive - middles, negative - middles])
    first = np.linalg.svd(both)[2][0]
    assert abs(pca(positive, negative, variant="pair_centred") @ first) == pytest.approx(1, abs=1e-12)


def test_positives_are_higher_by_the_mean_and_for_repengs_variants_in_most_pairs():
    # two pairs a little apart one way, one pair far apart the other way
    positive, negative = np.array([[1.0, 0.0], [1.0, 0.0], [-9.0, 0.0]]), np.zeros((3, 2))
    assert pca(positive, negative).tolist() == [-1.0, 0.0]
    assert pca(positive, negative, variant="pair_centred").tolist() == [1.0, 0.0]
    assert pca(positive, negative, variant="centred").tolist() == [1.0, 0.0]


def test_pca_asks_for_pairs_and_knows_its_variants():
    with pytest.raises(UserError, match="3 positive and 2 negative"):
        pca(np.ones((3, 2)), np.ones((2, 2)))
    with pytest.raises(UserError, match="Did you mean centred"):
        pca(np.ones((2, 2)), np.ones((2, 2)), variant="center")  # pyright: ignore[reportArgumentType]


# scikit-learn 1.9.1 on `sets` of this shape: LogisticRegression(C=1 / l2, tol=1e-12, solver="newton-cholesky") of the
# states over s, as `logistic` says, and LinearDiscriminantAnalysis(solver="lsqr", shrinkage=...), at length 1;
# ledoit_wolf(residuals, assume_centered=True)
SKLEARN_LOGISTIC = {
    ((30, 24, 6), 0.1): [0.0830158, 0.5184286, 0.7694016, 0.0114579, 0.1388806, 0.3360687],
    ((30, 24, 6), 1.0): [0.0964467, 0.5650889, 0.7073239, -0.0224267, 0.0427734, 0.4107712],
    ((30, 24, 6), 20.0): [0.2258273, 0.7503839, 0.3396467, -0.1440538, -0.0712068, 0.4947163],
    ((5, 4, 9), 0.1): [
        0.1527798,
        0.0580066,
        0.2742977,
        0.4487372,
        -0.2931354,
        -0.235529,
        0.0749993,
        -0.7187532,
        0.181813,
    ],
    ((5, 4, 9), 1.0): [
        0.1343048,
        0.1452932,
        0.3149712,
        0.3026681,
        -0.2811762,
        -0.1318538,
        0.1751408,
        -0.7847578,
        0.1645377,
    ],
    ((5, 4, 9), 20.0): [
        0.1142829,
        0.3569249,
        0.5220912,
        0.0965075,
        -0.2028003,
        0.0990806,
        0.4019052,
        -0.5563344,
        0.2359458,
    ],
}
SKLEARN_LDA = {
    ((24, 24, 6), 0.1): [0.2367653, 0.4147594, 0.7236083, 0.0079769, 0.4263209, 0.2578657],
    ((24, 24, 6), 0.5): [0.420649, 0.4944951, 0.4666199, -0.1606818, 0.3703722, 0.4447479],
    ((5, 5, 9), 0.1): [
        0.4196269,
        0.0792323,
        0.1820355,
        0.0840307,
        0.0769197,
        -0.2092369,
        -0.1646265,
        -0.8028007,
        0.2369595,
    ],
    ((5, 5, 9), 0.5): [
        0.249858,
        0.3316909,
        0.2240095,
        -0.0300172,
        -0.0264038,
        0.1989515,
        -0.0009432,
        -0.8463735,
        0.140865,
    ],
}
SKLEARN_SHRINKAGE = {(30, 24, 6): 0.21881296184402343, (5, 4, 9): 0.5899907335831832}


@pytest.mark.parametrize("shape", [(30, 24, 6), (5, 4, 9)])
@pytest.mark.parametrize("l2", [0.1, 1.0, 20.0])
def test_logistic_regression_is_at_its_minimum(shape: tuple[int, int, int], l2: float):
    positive, negative = sets(*shape)
    residuals = np.concatenate([positive - positive.mean(0), negative - negative.mean(0)])
    states = np.concatenate([positive, negative]) / np.sqrt((residuals**2).mean())
    labels = np.repeat([1.0, -1.0], shape[:2])
    found = logistic(positive, negative, l2=l2)

    def loss(w: np.ndarray, b: float) -> float:
        return float(np.log1p(np.exp(-labels * (states @ w + b))).sum() + l2 / 2 * w @ w)

    # descend from scratch, by plain gradient steps, to the same direction
    w, b = np.zeros(shape[2]), 0.0
    rate = 1 / (0.25 * np.linalg.norm(np.c_[states, np.ones(len(states))], 2) ** 2 + l2)
    for _ in range(20_000):
        wrong = labels / (1 + np.exp(labels * (states @ w + b)))
        w, b = w + rate * (states.T @ wrong - l2 * w), b + rate * wrong.sum()
    assert cosine(found, w) == pytest.approx(1, abs=1e-7)
    assert loss(np.linalg.norm(w) * found, b) <= loss(w, b) + 1e-6


@pytest.mark.parametrize(("shape", "l2"), list(SKLEARN_LOGISTIC))
def test_logistic_regression_is_scikit_learns(shape: tuple[int, int, int], l2: float):
    assert logistic(*sets(*shape), l2=l2) == pytest.approx(np.array(SKLEARN_LOGISTIC[shape, l2]), abs=1e-6)


@pytest.mark.parametrize(("shape", "shrinkage"), list(SKLEARN_LDA))
def test_discriminants_are_scikit_learns(shape: tuple[int, int, int], shrinkage: float):
    assert lda(*sets(*shape), shrinkage=shrinkage) == pytest.approx(np.array(SKLEARN_LDA[shape, shrinkage]), abs=1e-6)


def test_the_estimated_shrinkage_is_scikit_learns():
    for shape, expected in SKLEARN_SHRINKAGE.items():
        positive, negative = sets(*shape)
        residuals = np.concatenate([positive - positive.mean(0), negative - negative.mean(0)])
        assert directions.ledoit_wolf(residuals) == pytest.approx(expected, rel=1e-9)
        assert lda(positive, negative) == pytest.approx(lda(positive, negative, shrinkage=expected), abs=1e-9)


@pytest.mark.parametrize("shape", [(30, 24, 6), (8, 6, 40)])
def test_discriminants_solve_the_dense_system(shape: tuple[int, int, int]):
    positive, negative = sets(*shape)
    residuals = np.concatenate([positive - positive.mean(0), negative - negative.mean(0)])
    pooled = residuals.T @ residuals / len(residuals)
    for shrinkage in (0.05, 0.5, 1.0):
        shrunk = (1 - shrinkage) * pooled + shrinkage * np.trace(pooled) / shape[2] * np.eye(shape[2])
        expected = unit(np.linalg.inv(shrunk) @ mean_difference(positive, negative))
        assert lda(positive, negative, shrinkage=shrinkage) == pytest.approx(expected, abs=1e-9)


def test_what_cannot_be_solved_is_said():
    with pytest.raises(UserError, match="40 dimensions need more than 41 prompts, and there are 14"):
        lda(*sets(8, 6, 40), shrinkage=0.0)
    with pytest.raises(UserError, match="shrinkage is 2"):
        lda(*sets(8, 6, 4), shrinkage=2.0)
    with pytest.raises(UserError, match="l2 is 0"):
        logistic(*sets(8, 6, 4), l2=0.0)
    with pytest.raises(UserError, match="not finite"):
        mean_difference(np.array([[np.inf]]), np.zeros((1, 1)))
    with pytest.raises(UserError, match="at least one"):
        mean_difference(np.zeros((0, 2)), np.zeros((1, 2)))
    with pytest.raises(UserError, match="it is zero"):
        unit(mean_difference(np.ones((2, 3)), np.ones((2, 3))))


@pytest.mark.parametrize("method", list(directions.METHODS))
def test_what_is_extracted_moves_one_set_as_far_as_the_other(method: str):
    positive, negative = sets(60, 60, 12)
    found = extract(method, positive, negative)
    along = unit(found)
    assert (negative + found).mean(0) @ along == pytest.approx(positive.mean(0) @ along, rel=1e-9)


def test_methods_and_options_are_found_by_name():
    positive, negative = sets(10, 10, 4)
    assert (extract("mean-difference", positive, negative) == mean_difference(positive, negative)).all()
    centred = extract("pca", positive, negative, variant="centred")
    assert abs(cosine(centred, pca(positive, negative, variant="centred"))) == pytest.approx(1)
    with pytest.raises(UserError, match="Did you mean logistic"):
        extract("logistics", positive, negative)
    with pytest.raises(UserError, match="Did you mean shrinkage"):
        extract("lda", positive, negative, shrink=0.1)
    with pytest.raises(UserError, match="takes none"):
        extract("mean_difference", positive, negative, l2=0.1)


def test_projections_by_hand():
    direction, baseline = np.array([3.0, 4.0, 1.0]), np.array([0.0, 2.0, 0.0])
    assert projected(direction, baseline).tolist() == [3.0, 0.0, 1.0]
    assert directions.biprojected(direction, baseline) == pytest.approx(np.array([3, 0, 1]) * np.sqrt(26 / 10))
    assert projected(direction, np.zeros(3)).tolist() == direction.tolist()
    with pytest.raises(UserError, match="nothing is left"):
        projected(direction, -2 * direction)


def test_a_projection_leaves_no_more_than_rounding_where_almost_all_goes():
    rng = np.random.default_rng(0)
    baseline = 1e3 * rng.standard_normal(4096)
    rest = rng.standard_normal(4096)
    rest -= (rest @ baseline) / (baseline @ baseline) * baseline
    found = projected(baseline + 1e-3 * rest, baseline)
    assert abs(found @ baseline) < 1e-12 * np.linalg.norm(found) * np.linalg.norm(baseline)
    assert cosine(found, rest) > 1 - 1e-9


def test_a_subspace_holds_what_only_positives_scatter_along():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((32, 32)))[0].T
    noise = 0.1 * rng.standard_normal((2, 400, 32))
    topics = 5 * rng.standard_normal((2, 400, 1)) * axes[3]  # in both sets, and larger than all else
    more = rng.standard_normal((400, 3)) * (6.0, 2.0, 1.0)  # the most along the mean difference itself
    positive = noise[0] + topics[0] + 40 * axes[0] + more @ axes[:3]
    negative = noise[1] + topics[1]
    found = subspace(positive, negative, 3)
    assert found @ found.T == pytest.approx(np.eye(3), abs=1e-12)
    assert found[0] == pytest.approx(unit(mean_difference(positive, negative)), abs=1e-12)
    kept = ((found @ axes[:4].T) ** 2).sum(0)  # share of each axis that lies in the subspace
    assert (kept[:3] > 0.95).all() and kept[3] < 0.02
    assert abs(found[1] @ axes[1]) > abs(found[1] @ axes[2])  # the larger first


def test_a_subspace_has_as_many_directions_as_there_are():
    positive, negative = sets(3, 30, 12)
    assert subspace(positive, negative, 1).shape == (1, 12)
    with pytest.raises(UserError, match="carry 1 to 3"):
        subspace(positive, negative, 4)
    with pytest.raises(UserError, match="of 0"):
        subspace(positive, negative, 0)


def test_winsorised_states_by_hand():
    states = np.array([[1.0, -2.0, 3.0, -100.0, 0.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    assert directions.winsorise(states, 0.75).tolist() == [[1, -2, 3, -3, 0], [5, 5, 5, 5, 5]]
    assert (directions.winsorise(states, 1.0) == states).all()
    with pytest.raises(UserError, match="0.995"):
        directions.winsorise(states, 0.0)


def test_between_blocks_by_hand():
    vectors = {3: np.array([10.0, 0.0]), 4: np.array([0.0, 0.1]), -1: np.array([0.0, -7.0])}
    assert directions.interpolate(vectors, 3).tolist() == [1.0, 0.0]
    assert directions.interpolate(vectors, 3.25) == pytest.approx(np.array([0.75, 0.25]) / np.sqrt(0.625))
    assert directions.interpolate(vectors, -1).tolist() == [0.0, -1.0]
    with pytest.raises(UserError, match="no direction of block 5, which 4.5 needs"):
        directions.interpolate(vectors, 4.5)
