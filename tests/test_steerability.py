# SPDX-License-Identifier: Apache-2.0
"""Separability against sums by hand, simulated coverage, and data with and without a direction planted in it."""

import dataclasses
import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mlx_realign import steerability
from mlx_realign.errors import UserError
from mlx_realign.intervals import Interval
from mlx_realign.steerability import auroc, best, d_prime, mann_whitney, pair_agreement, report, warn


def planted(n: int, m: int, apart: list[float], seed: int = 0, width: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """States [n, L, d] and [m, L, d] of unit noise; block l's sets are apart[l] standard deviations apart."""
    rng = np.random.default_rng(seed)
    shift = np.zeros((len(apart), width))
    shift[:, 0] = apart
    draw = lambda count: rng.standard_normal((count, len(apart), width)).astype(np.float32)  # noqa: E731
    return draw(n) + shift.astype(np.float32), draw(m)


# ------------------------------------------------------------------ numbers


def test_auroc_counts_pairs_and_halves_ties():
    # 3 against 1, 2, 3: two wins and a tie; 2: a win and a tie; 0: none. (2.5 + 1.5 + 0) / 9
    assert auroc(np.array([3.0, 2.0, 0.0]), np.array([1.0, 2.0, 3.0])) == pytest.approx(4 / 9)
    assert auroc(np.array([1.0, 1.0]), np.array([1.0])) == 0.5
    rng = np.random.default_rng(0)
    for _ in range(20):
        positive, negative = rng.integers(0, 6, 17).astype(float), rng.integers(0, 5, 11).astype(float)
        wins = sum((p > q) + (p == q) / 2 for p in positive for q in negative)
        assert auroc(positive, negative) == pytest.approx(wins / (17 * 11), rel=1e-12)


def test_the_interval_ends_where_its_equation_does():
    found = mann_whitney(0.8, 20, 30)
    for edge in (found.low, found.high):
        q1, q2 = edge / (2 - edge), 2 * edge**2 / (1 + edge)  # Hanley and McNeil 1982, with (20 + 30) / 2 - 1 = 24
        spread = (edge * (1 - edge) + 24 * (q1 - edge**2) + 24 * (q2 - edge**2)) / (20 * 30)
        assert (0.8 - edge) ** 2 == pytest.approx(1.959963984540054**2 * spread, rel=1e-9)
    assert found.low < 0.8 < found.high


def test_the_interval_has_a_width_where_nothing_is_confused():
    found = mann_whitney(1.0, 10, 10)
    assert found.high == 1 and 0.6 < found.low < 0.9
    assert mann_whitney(0.0, 10, 10) == pytest.approx((0, 0, 1 - found.low), abs=1e-9)
    assert mann_whitney(1.0, 100, 100).low > 0.96
    nothing = mann_whitney(math.nan, 1, 1)
    assert math.isnan(nothing.value) and nothing[1:] == (0, 1)


@pytest.mark.parametrize(("apart", "n", "m"), [(1.0, 25, 40), (2.5, 15, 15)])
def test_the_interval_holds_the_truth_95_times_in_100(apart: float, n: int, m: int):
    truth = (1 + math.erf(apart / 2)) / 2  # P(x > y) for two normal variables of variance 1
    rng, held, runs = np.random.default_rng(0), 0, 1500
    for _ in range(runs):
        found = mann_whitney(auroc(apart + rng.standard_normal(n), rng.standard_normal(m)), n, m)
        held += found.low <= truth <= found.high
    assert 0.93 <= held / runs <= 0.985


def test_d_prime_by_hand():
    # means 4 and 1, variances (n - 1) 2 and 4: 3 / sqrt(3)
    assert d_prime(np.array([3.0, 5.0]), np.array([-1.0, 1.0, 3.0])) == pytest.approx(math.sqrt(3))
    assert math.isnan(d_prime(np.array([3.0]), np.array([1.0, 2.0])))
    assert d_prime(np.ones(2), np.zeros(2)) == math.inf and d_prime(np.ones(2), np.ones(2)) == 0


def test_the_agreement_of_pairs_by_hand():
    # (1, 0) and the mean of the others (0.5, 0.5): cos 45 deg; (0, 1) and (1, 0): 0
    found = pair_agreement(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    cosines = np.array([math.sqrt(0.5), math.sqrt(0.5), 0.0])
    half = 1.959963984540054 * cosines.std(ddof=1) / math.sqrt(3)
    assert found == pytest.approx((cosines.mean(), cosines.mean() - half, cosines.mean() + half))
    assert pair_agreement(np.array([[2.0, 0.0], [5.0, 0.0]])) == (1, 1, 1)
    assert math.isnan(pair_agreement(np.ones((1, 2))).value)


# ------------------------------------------------------------------ the report


def test_the_report_measures_what_was_planted():
    positive, negative = planted(1000, 800, [0.0, 2.0])
    none, two = report(positive, negative, [4, 7])
    assert (none.block, two.block, two.positives, two.negatives) == (4, 7, 1000, 800)
    assert two.norm == pytest.approx(2.0, abs=0.15)
    assert two.median_norm == pytest.approx(math.sqrt(49), rel=0.05) and two.share == two.norm / two.median_norm
    # fitted on half the data the direction is tilted: cos^2 = 4 / (4 + 48 (1/500 + 1/400))
    tilted = 2 * math.sqrt(4 / (4 + 48 * (1 / 500 + 1 / 400)))
    assert two.d_prime == pytest.approx(tilted, abs=0.12)
    assert two.auroc.value == pytest.approx((1 + math.erf(tilted / 2)) / 2, abs=0.02)
    assert two.auroc == mann_whitney(two.auroc.value, 500, 400)  # as sure as one half: the other is not independent
    assert two.agreement.value > 0.9 > 0.3 > abs(none.agreement.value)
    assert abs(none.d_prime) < 0.25 and none.auroc.low < 0.55


def test_what_was_not_fitted_on_is_not_separable_by_hindsight():
    positive, negative = planted(20, 20, [0.0], width=2000)
    both = np.concatenate([positive, negative])[:, 0] @ (positive.mean(0) - negative.mean(0))[0]
    assert auroc(both[:20], both[20:]) == 1.0  # on the prompts it was fitted on
    assert report(positive, negative, [0])[0].auroc.low < 0.5


def test_pairs_that_share_their_topic_agree_on_what_differs():
    rng = np.random.default_rng(0)
    topic = 3 * rng.standard_normal((40, 1, 48)).astype(np.float32)
    positive, negative = planted(40, 40, [3.0])
    # a difference has 9 of shift and 2 * 48 of noise: cosine with the mean of 39 others
    expected = 9 / math.sqrt((9 + 96) * (9 + 96 / 39))
    found = report(positive + topic, negative + topic, [0], paired=True)[0]
    assert found.paired and found.agreement.value == pytest.approx(expected, abs=0.04)
    assert found.agreement.low < expected < found.agreement.high
    with pytest.raises(UserError, match="40 positive and 39 negative prompts are no pairs"):
        report(positive, negative[:39], [0], paired=True)


def test_pairs_are_held_out_together():
    rng = np.random.default_rng(0)
    topic = 3 * rng.standard_normal((400, 1, 400)).astype(np.float32)
    positive, negative = planted(400, 400, [3.0], width=400)
    # topics cancel within a half of 200 pairs: cosine^2 with the shift is 9 / (9 + 400 (1/200 + 1/200)); measured
    # along it they do not: the variance is 1 + 9. Halves that part a pair would leave a cosine of 0.4 of 0.83.
    found = report(positive + topic, negative + topic, [0], paired=True)[0]
    assert found.d_prime == pytest.approx(3 * math.sqrt(9 / 13) / math.sqrt(10), abs=0.15)


def test_the_report_is_the_same_in_another_unit_and_for_the_same_seed():
    positive, negative = planted(30, 30, [1.0])
    one, again = (report(positive, negative, [0], seed=3)[0] for _ in range(2))
    scaled = report(positive * 1024, negative * 1024, [0], seed=3)[0]
    assert one == again
    numbers = [[s.d_prime, s.share, *s.auroc, *s.agreement] for s in (scaled, one)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-9)


def test_the_best_block_is_the_clearest_early_one():
    positive, negative = planted(100, 100, [9.0, 1.0, 3.0, 2.0, 1.0, 9.0])
    found = report(positive, negative, [-1, 0, 1, 2, 3, 4])
    assert best(found) == 1  # clearer are block 4, the last of five, and the embeddings, which are no block
    assert best(found[5:]) == 4  # unless there is no other
    few = report(*planted(100, 100, [1.0, 3.0, 2.0, 9.0]), [0, 1, 2, 3])
    assert best(few) == 1  # nor is it the last of four


def test_a_direction_that_is_there_is_not_warned_of():
    for seed in range(10):
        positive, negative = planted(60, 60, [0.0, 0.5, 2.5, 2.0, 2.0], seed)
        assert warn(report(positive, negative, [-1, 0, 1, 2, 3])) is None


def test_a_direction_that_is_not_there_is_warned_of():
    told = [warn(report(*planted(60, 60, [0.0] * 12, seed), list(range(12)))) for seed in range(40)]
    assert all(told)
    line = told[0] or ""
    assert "\n" not in line and "random halves agree little" in line and "0.5 is the least" in line
    by_chance = [one for one in told if one and "chance gives" in one]
    assert len(by_chance) >= 36  # of 40: at 95%, with the best block picked among twelve


def test_few_prompts_and_pairs_that_disagree_are_warned_of_with_numbers():
    positive, negative = planted(8, 200, [9.0])
    told = warn(report(positive, negative, [0])) or ""
    assert "few prompts (8 positive, 200 negative; 16 of each are the least)" in told
    rng = np.random.default_rng(0)
    noise = 6 * rng.standard_normal((100, 1, 400)).astype(np.float32)
    positive, negative = planted(100, 100, [2.0], width=400)
    told = warn(report(positive + noise, negative, [0], paired=True)) or ""
    assert "pairs agree little" in told and "0.1 is the least" in told
    unsure = dataclasses.replace(report(*planted(60, 60, [3.0]), [0])[0], agreement=Interval(0.6, -0.1, 1.0))
    assert "random halves agree little on it: cosine 0.60 (-0.10 to 1.00)" in (warn([unsure]) or "")
    alone = warn(report(positive[:1], negative[:1], [0])) or ""
    assert "few prompts (1 positive" in alone


# ------------------------------------------------------------------ for people


def test_the_table_and_the_summary_say_the_numbers():
    separations = report(*planted(50, 50, [0.0, 3.0, 1.0]), [0, 1, 2])
    console = Console(width=100, file=io.StringIO())
    console.print(steerability.table(separations))
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    marked = next(line for line in lines if ">" in line)
    s = separations[1]
    assert marked.split()[:2] == [">", "1"] and f"{s.share:.1%}" in marked and f"{s.d_prime:.2f}" in marked
    assert f"{s.auroc.value:.2f} ({s.auroc.low:.2f} to {s.auroc.high:.2f})" in marked
    said = steerability.summary(separations)
    assert said["best_block"] == 1 and said["auroc"] == [round(x, 4) for x in s.auroc] and said["prompts"] == [50, 50]
    assert "half_agreement" in said
    infinite = steerability.Separation(0, 1.0, 0.0, True, Interval(1, 1, 1), math.inf, Interval(1, 0.5, 1), 2, 2)
    assert steerability.summary([infinite])["d_prime"] is None


def test_the_plot_is_an_image(tmp_path: Path):
    pytest.importorskip("matplotlib")
    separations = report(*planted(30, 30, [0.0, 3.0]), [-1, 0])
    steerability.plot(separations, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="a.doc"):
        steerability.plot(separations, tmp_path / "a.doc")


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'mlx-realign\[plots\]'"):
        steerability.plot(report(*planted(4, 4, [1.0]), [0]), tmp_path / "a.png")
