# SPDX-License-Identifier: Apache-2.0
"""What evaluate counts: made-up completions counted by hand, verdicts asked for again, the table."""

import io
import json
import math
import re
from typing import Any

import pytest

from mlx_realign.evaluate_answers import Judged, full, verdicts_of
from mlx_realign.evaluate_report import compare, summarise, write
from mlx_realign.intervals import wilson
from mlx_realign.terminal import Console
from mlx_realign.verifiers import Verdict, Verifier

EXACT, TAGS = Verifier("exact", "exact", "", False, 5.0), Verifier("format", "format", "", True, 5.0)
SAID = {"r": Verdict(1.0, ""), "w": Verdict(0.0, ""), "u": Verdict(0.0, "unparsed"), "n": Verdict(None, "not_reached")}


def made(mark: str) -> Judged:
    """r right, w wrong, u unparsed (and cut), n never judged; a capital letter also has the form."""
    said = [SAID[mark.lower()], Verdict(float(mark.isupper()), "")]
    lost, reward = mark in "uU", math.nan if mark == "n" else float(mark in "rR")
    return Judged("", 3, lost, said, right=full(said[:1]), form=full(said[1:]), unparsed=lost, reward=reward)


BEFORE = [[made(mark) for mark in group] for group in ("wwwu", "rwwu", "wwww", "rrww", "nnnn", "uwWw")]
AFTER = [[made(mark) for mark in group] for group in ("RRRR", "Rwwr", "wwwu", "RRRw", "rrrr", "RRnn")]


def test_counts_by_hand():
    found = summarise(BEFORE, [EXACT, TAGS], (1, 2))
    assert found["pass@1"]["value"] == pytest.approx((0 + 1 / 4 + 0 + 1 / 2 + 0) / 5)
    assert found["pass@1"]["problems"] == 5  # none of the fifth was judged
    # 1 - C(3, 2) / C(4, 2) = 1/2 and 1 - C(2, 2) / C(4, 2) = 5/6
    assert found["pass@2"]["value"] == pytest.approx((0 + 1 / 2 + 0 + 5 / 6 + 0) / 5)
    assert found["unparsed"]["value"] == pytest.approx(3 / 20)
    assert found["unparsed"]["problems"] == 5
    assert found["cut"]["value"] == pytest.approx(3 / 24)
    assert found["format"]["value"] == pytest.approx(1 / 24)
    assert found["reasons"] == {"exact": {"unparsed": 3, "not_reached": 4}, "format": {}}
    assert found["scores"] == {"exact": pytest.approx(3 / 20), "format": pytest.approx(1 / 24)}
    assert (found["completions"], found["unjudged"]) == (24, 4)
    assert found["reward"] == pytest.approx(3 / 20)
    json.dumps(found, allow_nan=False)


def test_pass_at_k_is_measured_on_sets_of_k():
    alike = [[made(mark) for mark in "rwww"]] * 4
    found = summarise(alike, [EXACT, TAGS], (1, 2, 3))  # problems that do not differ: each set counts for itself
    assert tuple(found["pass@1"].values()) == pytest.approx((*wilson(4, 16), 4))
    assert tuple(found["pass@2"].values()) == pytest.approx((*wilson(4, 8), 4))
    assert tuple(found["pass@3"].values()) == pytest.approx((*wilson(3, 4), 4))


def test_differences_by_hand():
    found = compare(BEFORE, AFTER, [EXACT, TAGS], (1, 4))
    # of the five problems judged on both sides: 0 to 1, 1/4 to 1/2, 0 to 0, 1/2 to 3/4, 0 to 1
    change = found["pass@1"]
    assert change["value"] == pytest.approx((1 + 1 / 4 + 0 + 1 / 4 + 1) / 5)
    assert (change["higher"], change["lower"], change["p"]) == (4, 0, 2 / 16)
    # only two of the last one's completions after training were judged, so it has no pass@4
    assert found["pass@4"]["value"] == pytest.approx((1 + 0 + 0 + 0) / 4)
    assert (found["pass@4"]["higher"], found["pass@4"]["p"]) == (1, 1)


def test_nothing_judged_is_no_number():
    none = [[made("n")], [made("n")]]
    found, change = summarise(none, [EXACT, TAGS], (1,)), compare(none, none, [EXACT, TAGS], (1,))
    assert (found["pass@1"]["value"], found["pass@1"]["problems"], found["reward"]) == (None, 0, None)
    assert (change["pass@1"]["value"], change["pass@1"]["p"]) == (None, 1)
    json.dumps([found, change], allow_nan=False)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([(1.0, "")], True),
        ([(0.999, "")], False),
        ([(1.0, ""), (0.0, "error")], False),
        ([(1.0, ""), (None, "")], True),  # the second one does not apply
        ([(1.0, ""), (None, "not_reached")], None),  # it might have said no
        ([(0.0, ""), (None, "not_reached")], None),
        ([(None, "")], None),
        ([], None),
    ],
)
def test_right_is_a_full_score_from_all_that_apply(verdicts: list[tuple[float | None, str]], expected: bool | None):
    assert full([Verdict(*one) for one in verdicts]) is expected


class Hasty:
    """A pool that comes to `reach` completions of a batch, and scores each with the number in it."""

    def __init__(self, reach: int) -> None:
        self.reach, self.batches = reach, []

    def judge(self, completions: list[str], rows: list[dict[str, Any]]) -> list[list[Verdict]]:
        assert [row["text"] for row in rows] == completions
        self.batches.append(len(completions))
        done = [[Verdict(float(text), "")] for text in completions[: self.reach]]
        return done + [[Verdict(None, "not_reached")]] * (len(completions) - len(done))


def test_what_a_batch_had_no_time_for_is_asked_again():
    texts = ["0.1", "0.2", "0.3", "0.4", "0.5"]
    rows = [{"text": text} for text in texts]
    pool: Any = Hasty(2)
    assert [one[0].score for one in verdicts_of(pool, texts, rows)] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert pool.batches == [5, 3, 1]
    stuck: Any = Hasty(0)
    assert [one[0].reason for one in verdicts_of(stuck, texts, rows)] == ["not_reached"] * 5
    assert stuck.batches == [5]


def test_the_table_shows_both_sides_and_the_difference():
    found: dict[str, Any] = {"model": "m", "adapter": "a", "data": "d", "samples": 4, "max_new_tokens": 9}
    found |= {"problems": 6, "left_out": 2, "seconds": 61.4, "sampled": summarise(AFTER, [EXACT, TAGS], (1, 4))}
    found["greedy"] = summarise([group[:1] for group in AFTER], [EXACT, TAGS], (1,))
    lines = drawn(found)
    first = next(line for line in lines if "pass@1, greedy" in line)
    assert "83.3%" in first  # five of six
    assert "43.6-97.0" in first  # Wilson's interval of 5 of 6
    assert any(
        "6 problems, one greedy and 4 sampled completions of each; rows left out: 2; 61 s" in line for line in lines
    )
    assert any("cut at 9, sampled" in line for line in lines)
    assert any("sampled, exact: not_reached 2, unparsed 1" in line for line in lines)
    found["before"] = {"sampled": summarise(BEFORE, [EXACT, TAGS], (1, 4))}
    found["before"]["greedy"] = summarise([group[:1] for group in BEFORE], [EXACT, TAGS], (1,))
    found["difference"] = {"sampled": compare(BEFORE, AFTER, [EXACT, TAGS], (1, 4))}
    old, new = ([group[:1] for group in side] for side in (BEFORE, AFTER))
    found["difference"]["greedy"] = compare(old, new, [EXACT, TAGS], (1,))
    lines = drawn(found)
    row = next(line for line in lines if "pass@1, sampled" in line)
    assert all(part in row for part in ("15.0%", "70.8%", "+50.0", "4, 0", "0.12"))
    assert any("McNemar" in line for line in lines)
    narrow = drawn(found, width=80)  # intervals below their shares, and nothing cut
    at = next(i for i, line in enumerate(narrow) if "pass@1, sampled" in line)
    assert all(part in narrow[at] for part in ("15.0%", "70.8%", "+50.0", "4, 0", "0.12"))
    assert all(part in narrow[at + 1] for part in re.findall(r"[+-]?\d+\.\d(?:-| to )\S+", row))
    assert "\u2026" not in "".join(narrow)


def drawn(found: dict[str, Any], width: int = 120) -> list[str]:
    out = io.StringIO()
    write(found, Console(file=out, width=width))
    return out.getvalue().splitlines()
