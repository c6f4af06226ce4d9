# SPDX-License-Identifier: Apache-2.0
"""The front of a search: who is on it, which trial each way of picking takes, what the table and the plot show."""

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlx_realign.ablation import pareto
from mlx_realign.ablation.kernel import Kernel, Tent
from mlx_realign.ablation.pareto import Trial, choose, dominates, front, hypervolume
from mlx_realign.ablation.scorers import Divergence, Markers, Scorer
from mlx_realign.errors import UserError

KERNEL = Kernel({"attention": Tent(1.25, 20.5, 0.5, 7.0), "mlp": Tent(0.0, 18.0, 0.0, 3.0)}, 14.2)


@pytest.fixture
def scorers() -> list[Scorer]:
    markers, kl = Markers.__new__(Markers), Divergence.__new__(Divergence)
    markers.prompts, kl.name, kl.tokens, kl.prompts = [[1]] * 50, "kl", 1, [[1]] * 50
    return [markers, kl]


def trials(*scores: tuple[float, float], pruned: tuple[int, ...] = ()) -> list[Trial]:
    return [Trial(i, KERNEL, pair, i in pruned) for i, pair in enumerate(scores)]


def test_dominance_is_nowhere_worse_and_somewhere_better():
    assert dominates((0.1, 0.2), (0.1, 0.3)) and dominates((0.0, 0.0), (1.0, 1.0))
    assert not dominates((0.1, 0.2), (0.1, 0.2)) and not dominates((0.0, 0.3), (0.1, 0.2))


def test_the_front_leaves_out_what_another_beats_and_what_was_pruned(scorers: list[Scorer]):
    some = trials((0.9, 0.02), (0.5, 0.1), (0.6, 0.2), (0.1, 0.9), (0.0, 0.05), (0.5, 0.1), pruned=(4,))
    assert [trial.number for trial in front(some, scorers)] == [3, 1, 0]


def test_what_is_kept_of_a_search_is_the_front_and_the_trial_that_was_taken(scorers: list[Scorer]):
    some = trials((0.9, 0.02), (0.5, 0.1), (0.6, 0.2), (0.0, 0.05), pruned=(3,))
    told = pareto.facts(some, scorers, (0.98, 0.0), some[2])
    assert [(one["trial"], one["scores"]) for one in told.pop("front")] == [(1, (0.5, 0.1)), (0, (0.9, 0.02))]
    assert told == {
        "scorers": ["markers", "kl"],
        "unedited": (0.98, 0.0),
        "chosen": {"trial": 2, "scores": (0.6, 0.2)},
        "trials": 4,
        "pruned": 1,
    }
    rows = [line.split(" | ") for line in pareto.section(some, scorers, (0.98, 0.0), some[2]).splitlines()[2:]]
    assert [row[0] for row in rows] == ["| trial", "| ---:", "| unedited", "| 1", "| 0", "| 2 <-"]
    assert rows[3][1:4] == ["50.0% (37 to 63)", "0.100", "block 14.2"]  # Wilson for 25 of 50: 0.5 -+ 0.134


def test_below_a_hundredth_of_a_nat_a_lower_kl_buys_nothing(scorers: list[Scorer]):
    some = trials((0.9, 0.001), (0.7, 0.009), (0.95, 0.0))
    assert [trial.number for trial in front(some, scorers)] == [1]


def test_gaps_of_the_front_are_filled_from_their_dear_ends_the_widest_first(scorers: list[Scorer]):
    """Strengths by hand: KL grows with strength^1.7. Unedited: 98% at a KL of 0."""
    one = trials((0.0, 0.04), (0.5, 0.1))
    [(trial, times)] = pareto.weaker(one, scorers, (0.98, 0.0))
    assert trial is one[0] and 0.04 * times**1.7 == pytest.approx(0.009), "to the finest KL, where nothing is yet"
    # Gaps: 0.01 to 0.04 by 0.4 (area 0.55), 0.04 to 0.3 by 0.5 (1.01); of a KL below 0.01 nothing is asked.
    some = trials((0.9, 0.002), (0.5, 0.04), (0.0, 0.3))
    (first, up), (second, down) = pareto.weaker(some, scorers, (0.98, 0.0))
    assert (first, second) == (some[2], some[1])
    assert 0.3 * up**1.7 == pytest.approx((0.04 * 0.3) ** 0.5) and 0.04 * down**1.7 == pytest.approx(0.02)
    near = trials((0.9, 0.002), (0.5, 0.015))
    [(_, times)] = pareto.weaker(near, scorers, (0.98, 0.0))
    assert 0.015 * times**1.7 == pytest.approx(0.009), "not much lies between"
    assert pareto.weaker(trials((0.5, 0.04), (0.49, 0.041)), scorers, (0.5, 0.0)) == [], "nothing is to be gained"
    assert pareto.weaker(one, scorers[:1], (0.98,)) == [], "what is not measured on given texts does not fall smoothly"


def test_the_knee_is_where_both_are_low_on_their_own_scales(scorers: list[Scorer]):
    # Rates scaled 0 to 1: 0, 0.125, 0.5, 1; log KL from 0.01 to 1: 1, 0.5, 0.389, 0. Sums: 1, 0.625, 0.889, 1.
    some = trials((0.0, 1.0), (0.1, 0.1), (0.4, 0.06), (0.8, 0.01))
    assert choose("knee", some, scorers).number == 1
    assert choose("knee", some[:1], scorers).number == 0


def test_best_kl_is_taken_among_rates_that_50_prompts_cannot_tell_from_the_lowest(scorers: list[Scorer]):
    # 0 of 50: Wilson's upper bound is 3.84 / 53.84 = 0.0713; 3 of 50 is inside, 4 of 50 not.
    some = trials((0.0, 0.9), (0.06, 0.3), (0.08, 0.1))
    assert choose("best-kl", some, scorers).number == 1
    assert choose("lowest", some, scorers).number == 0


def test_a_number_takes_that_trial_also_off_the_front(scorers: list[Scorer]):
    some = trials((0.0, 0.9), (0.5, 0.95), (0.6, 0.99), pruned=(2,))
    assert choose("1", some, scorers).number == 1
    for wrong in ("7", "2", "best"):
        with pytest.raises(UserError, match=rf"--pick {wrong}: expected knee, best-kl, lowest or .*\(best: 0\)"):
            choose(wrong, some, scorers)
    with pytest.raises(UserError, match="no trial was finished"):
        choose("knee", [], scorers)


def test_hypervolume_by_hand():
    # Below (1, 1): (0.2, 0.5) covers 0.8 x 0.5; (0.6, 0.1) adds 0.4 x 0.4; (0.7, 0.3) is inside of it; (2, 0) outside.
    assert hypervolume([(0.2, 0.5), (0.6, 0.1), (0.7, 0.3), (2.0, 0.0)], (1.0, 1.0)) == pytest.approx(0.4 + 0.16)
    assert hypervolume([], (1.0, 1.0)) == 0.0


def test_the_table_says_what_each_trial_does_and_which_is_taken(scorers: list[Scorer]):
    some = trials((0.0, 0.9), (0.5, 0.1), (0.9, 0.95))
    console = Console(file=io.StringIO(), width=200)
    console.print(pareto.table(some, scorers, (0.98, 0.0), some[2]))
    lines = [" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert "unedited 98.0% (90 to 100) 0.000" in lines
    assert "0 0.0% (0 to 7) 0.900 block 14.2 1.25 at 20.5, 0.50 at ±7.0 0.00 at 18.0, 0.00 at ±3.0" in lines
    assert any(line.startswith("2 <- 90.0%") for line in lines), "the chosen one is shown though it is off the front"


def test_the_plot_is_a_picture(scorers: list[Scorer], tmp_path: Path):
    pytest.importorskip("matplotlib")
    some = trials((0.0, 0.9), (0.5, 0.1), (0.9, 0.95), pruned=(2,))
    pareto.plot(some, scorers, (0.98, 0.0), some[1], tmp_path / "front.png")
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_names_the_extra(scorers: list[Scorer], tmp_path: Path, monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'mlx-realign\[search\]'"):
        pareto.plot(trials((0.0, 0.9)), scorers, (0.98, 0.0), None, tmp_path / "front.png")
