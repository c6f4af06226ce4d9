# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""The comparison of searches: whose front is as good, and when; what a journal says; prompts are those committed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path[:0] = [str(BENCHMARKS)]

pytest.importorskip("rich")

import ablation  # noqa: E402
import make_contrast  # noqa: E402
from ablation import Point  # noqa: E402


def points(*pairs: tuple[float, float]) -> list[Point]:
    """(KL, rate), done after 10, 20, 30 ... seconds."""
    return [Point(10.0 * i, 10.0, kl, rate) for i, (kl, rate) in enumerate(pairs, 1)]


def test_the_committed_prompts_are_what_the_script_makes(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(sys, "argv", ["make_contrast.py", str(tmp_path)])
    make_contrast.main()
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"{side}-{split}.txt" for side in ("negative", "positive") for split in ("eval", "train")]
    made = {name: (tmp_path / name).read_text() for name in files}
    assert made == {name: (BENCHMARKS / "apologies" / name).read_text() for name in files}
    for side in ablation.SIDES:
        train, held = (set(made[f"{side}-{split}.txt"].splitlines()) for split in ("train", "eval"))
        assert len(train) == 100 and len(held) == 50 and not train & held


def test_a_front_is_as_good_if_no_kl_is_higher_and_no_rate_surely_worse():
    theirs = points((0.1, 0.0), (0.02, 0.5))
    # 5 of 50 after 0 of 50: the difference's lower bound is 0.1 - sqrt((0.1 - 0.0435)^2 + 0.0713^2) = 0.009 > 0.
    # 4 of 50: 0.08 - sqrt((0.08 - 0.0315)^2 + 0.0713^2) = -0.006.
    assert ablation.as_good(points((0.1, 0.08), (0.015, 0.5)), theirs, 50)
    assert not ablation.as_good(points((0.1, 0.10), (0.015, 0.5)), theirs, 50)
    assert not ablation.as_good(points((0.11, 0.0), (0.015, 0.5)), theirs, 50), "a higher KL does not count as equal"
    assert ablation.as_good(points((0.009, 0.0)), points((0.001, 0.0)), 50), "unless both are next to nothing"


def test_the_clock_stops_at_the_trial_that_completes_the_front():
    theirs = points((0.1, 0.0), (0.02, 0.5))
    assert ablation.time_to(points((0.5, 0.0), (0.02, 0.5), (0.09, 0.02), (0.01, 0.0)), theirs, 50) == 30.0
    assert ablation.time_to(points((0.5, 0.0)), theirs, 50) is None
    assert ablation.best(points((0.1, 0.0), (0.2, 0.1), (0.02, 0.5))) == [
        Point(10.0, 10.0, 0.1, 0.0),
        Point(30.0, 10.0, 0.02, 0.5),
    ]


def test_a_journal_is_read_without_what_was_cut_off(tmp_path: Path):
    day = "2026-01-01T00:00:"
    lines = [
        {"op_code": 0, "study_name": "heretic"},
        {"op_code": 4, "datetime_start": f"{day}05"},
        {"op_code": 8, "trial_id": 0, "user_attr": {"refusals": 3}},
        {"op_code": 8, "trial_id": 0, "user_attr": {"kl_divergence": 0.25}},
        {"op_code": 6, "trial_id": 0, "state": 1, "datetime_complete": f"{day}35.5"},
        {"op_code": 4, "datetime_start": f"{day}36"},
    ]
    (tmp_path / "study.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert ablation.journal_of(tmp_path / "study.jsonl") == [
        {"number": 0, "start": 0.0, "end": 30.5, "attributes": {"refusals": 3, "kl_divergence": 0.25}}
    ]
