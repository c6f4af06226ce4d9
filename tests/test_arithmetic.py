# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""The report on sums: no sum on two sides, verdicts and shares that another reading finds too, a recipe that trains."""

import json
import math
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import arithmetic  # noqa: E402
import arithmetic_page  # noqa: E402

from mlx_realign import cli, config  # noqa: E402

REPORT = ROOT / "docs/arithmetic"
RESULT = json.loads((REPORT / "result.json").read_text())
REPLIES = arithmetic.read_rows(REPORT / "replies.jsonl")
METRICS = arithmetic.read_rows(REPORT / "metrics.jsonl")
SIDES = arithmetic.problems()
MODES = ("greedy", "sampled")


def two_numbers(row: dict[str, Any]) -> tuple[int, int]:
    """The numbers of "47 + 38", asked behind an example."""
    assert [message["role"] for message in row["prompt"]] == ["system", "user", "assistant", "user"]
    found = re.fullmatch(r"(\d+) \+ (\d+)", row["prompt"][-1]["content"])
    assert found, row
    return int(found[1]), int(found[2])


def last_number(text: str) -> float:
    """The last number of a reply, by a reading that is not the verifier's; NaN where it has none."""
    found = re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))
    return float(found[-1]) if found else math.nan


def test_sums_are_true_and_stand_on_one_side_only():
    assert {side: len(rows) for side, rows in SIDES.items()} == {"test": 100, "valid": 40, "train": 240}
    seen: set[frozenset[int]] = set()
    for row in [row for rows in SIDES.values() for row in rows]:
        a, b = two_numbers(row)
        assert 10 <= a <= 99 and 10 <= b <= 99 and row["answer"] == str(a + b)
        assert arithmetic.numbers(row) == (a, b)
        assert frozenset((a, b)) not in seen  # 12 + 34 is 34 + 12
        seen.add(frozenset((a, b)))
    assert frozenset((38, 27)) not in seen  # shown in every prompt
    assert SIDES == arithmetic.problems()


def test_the_larger_sums_are_true():
    rows = arithmetic.sums(*arithmetic.LARGER, seed=1)
    assert len(rows) == 50
    for row in rows:
        a, b = two_numbers(row)
        assert 100 <= min(a, b) and max(a, b) <= 999 and row["answer"] == str(a + b)


@pytest.mark.parametrize(("sum_of", "carries"), [((15, 25), True), ((15, 24), False), ((90, 90), False)])
def test_carries_by_hand(sum_of: tuple[int, int], carries: bool):
    row = {"prompt": [{"role": "user", "content": f"{sum_of[0]} + {sum_of[1]}"}]}
    assert arithmetic.carries(row) is carries


def test_completions_go_to_their_problem_and_mode():
    one = {"line": 2, "mode": "greedy", "completion": "7", "right": True}
    told = [one, one | {"mode": "sampled", "right": False}, one | {"mode": "sampled", "completion": "8"}]
    first, second = arithmetic.by_problem([{"prompt": "a"}, {"prompt": "b"}], told)
    empty = {"texts": [], "right": []}
    assert first == {"prompt": "a", "greedy": empty, "sampled": empty}
    assert second["greedy"] == {"texts": ["7"], "right": [True]}
    assert second["sampled"] == {"texts": ["7", "8"], "right": [False, True]}


def test_the_verdicts_are_those_of_another_reading():
    assert [{name: row[name] for name in ("prompt", "answer")} for row in REPLIES] == SIDES["test"]
    for when in ("before", "after"):
        told = [(row, *one) for row in REPLIES for mode in MODES for one in zip(*row[when][mode].values(), strict=True)]
        read = [last_number(text) == sum(two_numbers(row)) for row, text, _ in told]
        for (row, text, right), plain in zip(told, read, strict=True):
            assert plain or not right, (row["prompt"][-1], text)
        # The verifier refuses what is cut in the middle of a next sentence, say: it may miss some, and not many.
        assert np.mean(read) - np.mean([right for _, _, right in told]) < 0.03


def test_the_result_is_what_the_replies_show():
    held, n = RESULT["held_out"], len(REPLIES)
    right = {
        (when, mode): np.array([row[when][mode]["right"] for row in REPLIES], float)
        for when in ("before", "after")
        for mode in MODES
    }
    for when in ("before", "after"):
        greedy, sampled = right[when, "greedy"], right[when, "sampled"]
        assert greedy.shape == (n, 1) and sampled.shape == (n, arithmetic.SAMPLES)
        rate = held[when]["greedy"]["pass@1"]
        assert rate["value"] == pytest.approx(greedy.mean())
        # Wilson's interval: the shares p that lie z standard errors, sqrt(p (1 - p) / n), from the one observed.
        for bound in (rate["low"], rate["high"]):
            reach = 1.959964 * math.sqrt(bound * (1 - bound) / n)
            assert abs(rate["value"] - bound) == pytest.approx(reach, abs=1e-6)
        assert held[when]["sampled"]["pass@1"]["value"] == pytest.approx(sampled.mean())
        most = held[when]["sampled"][f"pass@{arithmetic.SAMPLES}"]
        assert most["value"] == pytest.approx(sampled.any(axis=1).mean())
    for mode in MODES:
        change = held["difference"][mode]["pass@1"]
        moved = right["after", mode].mean(axis=1) - right["before", mode].mean(axis=1)
        assert change["value"] == pytest.approx(moved.mean())
        assert (change["higher"], change["lower"]) == ((moved > 0).sum(), (moved < 0).sum())
    for name, wanted in (("with", True), ("without", False)):
        some = np.array([(sum(x % 10 for x in two_numbers(row)) > 9) is wanted for row in REPLIES])
        counts = {when: right[when, "greedy"][some].sum() for when in ("before", "after")}
        assert RESULT["carry"][name] == {"problems": some.sum()} | counts


def test_the_difference_is_newcombes_by_hand():
    # Ten problems, right before and after 2, only before 1, only after 5, never 2: Newcombe 1998, method 10.
    made = lambda hits: [{"greedy": {"right": [hit]}, "sampled": {"right": []}} for hit in hits]  # noqa: E731
    before, after = [1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1, 1, 0, 0]
    found = arithmetic.difference(made(before), made(after))
    assert set(found) == {"greedy"}
    change = found["greedy"]["pass@1"]
    assert change["value"] == pytest.approx(0.4) and (change["higher"], change["lower"]) == (5, 1)
    assert change["p"] == pytest.approx(2 * (1 + 6) / 64)

    def bounds(share: float) -> list[float]:
        z2 = 1.959963984540054**2
        root = math.sqrt(z2 * (z2 + 40 * share * (1 - share)))
        return [(20 * share + z2 + sign * root) / (2 * (10 + z2)) for sign in (-1, 1)]

    (low_1, high_1), (low_2, high_2) = bounds(0.3), bounds(0.7)
    phi = (2 * 2 - 1 * 5) / math.sqrt(3 * 7 * 7 * 3)  # no continuity correction below 0
    down, up = (0.7 - low_2, high_1 - 0.3), (high_2 - 0.7, 0.3 - low_1)
    assert change["low"] == pytest.approx(0.4 - math.sqrt(down[0] ** 2 + down[1] ** 2 - 2 * phi * down[0] * down[1]))
    assert change["high"] == pytest.approx(0.4 + math.sqrt(up[0] ** 2 + up[1] ** 2 - 2 * phi * up[0] * up[1]))


def test_training_made_it_clearly_better():
    held = RESULT["held_out"]
    for mode in MODES:
        assert held["after"][mode]["pass@1"]["low"] > held["before"][mode]["pass@1"]["high"]
        change = held["difference"][mode]["pass@1"]
        assert change["low"] > 0.1 and change["p"] < 1e-3
    assert RESULT["ordinary"]["after"]["degenerate"] <= RESULT["ordinary"]["before"]["degenerate"] + 0.1


def test_the_curve_is_the_mean_of_the_steps():
    steps = [row for row in METRICS if "loss" in row]
    assert len(steps) == RESULT["train"]["steps"] == steps[-1]["step"]
    recipe = RESULT["recipe"]
    assert len(steps) == recipe["steps"] and len(steps) * recipe["batch_size"] <= len(SIDES["train"])  # no sum twice
    assert RESULT["train"]["seconds"] == pytest.approx(sum(row["step_s"] for row in steps))
    for i, point in enumerate(RESULT["curve"]):
        assert (point["first"], point["last"]) == (10 * i + 1, min(10 * i + 10, len(steps)))
        assert point["reward"] == pytest.approx(np.mean([row["reward"] for row in steps[10 * i : 10 * i + 10]]))
    judged = {row["step"]: row["eval_reward"] for row in METRICS if "eval_reward" in row}
    assert [point["eval_reward"] for point in RESULT["curve"]] == [judged.get(p["last"]) for p in RESULT["curve"]]
    assert arithmetic.curve(METRICS) == RESULT["curve"]


def test_the_page_is_made_from_the_result(tmp_path: Path):
    report = tmp_path / "arithmetic"
    report.mkdir()
    for name in ("result.json", "replies.jsonl"):
        (report / name).write_bytes((REPORT / name).read_bytes())
    arithmetic_page.write_pages(report)
    text = (ROOT / "docs/arithmetic.md").read_text()
    assert (tmp_path / "arithmetic.md").read_text() == text
    rates = [RESULT["held_out"][when]["greedy"]["pass@1"]["value"] for when in ("before", "after")]
    assert f"right {rates[0]:.0%} of the time" in text and f"**{rates[1]:.0%}**" in text


def test_the_recipe_is_the_one_of_the_report_and_says_why():
    assert tomllib.loads(arithmetic.RECIPE.read_text()) == RESULT["recipe"]
    run = config.parse(["--config", str(arithmetic.RECIPE), "--model", "m", "--data", "d"])
    assert (run.method, run.config.verifier, run.config.max_new_tokens) == ("rlvr", "numeric", 14)
    assert run.settings.lora_alpha / run.settings.lora_rank == 2
    for line in arithmetic.RECIPE.read_text().splitlines():
        if re.match(r"\w+ = ", line) and not line.startswith("method = "):
            assert len(line.partition("#")[2].split()) >= 3, f"{line!r} does not say why"


def test_the_recipe_trains(tmp_path: Path):
    folder = tmp_path / "sums"
    folder.mkdir()
    for side in ("train", "valid"):
        arithmetic.write_rows(folder / f"{side}.jsonl", SIDES[side][:24])
    words = ["train", "--config", arithmetic.RECIPE, "--model", "tiny-chat", "--data", folder, "--steps", 2]
    assert cli.entry([str(word) for word in [*words, "--output", tmp_path / "out"]]) == 0
    rows = arithmetic.read_rows(tmp_path / "out/metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert len(steps) == 2 and all(0 <= row["reward"] <= 1 for row in steps)
    assert steps[1]["learning_rate"] == pytest.approx(2 * steps[0]["learning_rate"])  # still in the warm-up
    assert 0 <= rows[-1]["eval_reward"] <= 1
    assert (tmp_path / "out/adapters.safetensors").is_file()
