# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""The report on an apology: no errand on two sides, shares that another reading finds, a page made from the result."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import directions_report  # noqa: E402
import directions_report_page  # noqa: E402
import make_contrast  # noqa: E402

REPORT = ROOT / "docs/directions-report"
RESULT = json.loads((REPORT / "result.json").read_text())
ABLATED = directions_report.read_rows(REPORT / "ablated.jsonl")
STEERED = directions_report.read_rows(REPORT / "steered.jsonl")
SETS = directions_report.prompts()
MODELS = ("float32", "4-bit")
OPTIONS = {"position": "last", "block": "per-block", "blocks": "1-3", "weight": "1", "mlp_weight": 0.0}
FILES = ("result.json", "ablated.jsonl", "steered.jsonl", "search-float32.png")


def things(name: str, lines: list[str]) -> set[str]:
    """Which errands or topics are in prompts, whatever their wording."""
    text = make_contrast.ERRANDS if name == "errands" else make_contrast.TOPICS
    every = sorted(text.replace("\n", "|").split("|"), key=len, reverse=True)
    return {next(thing for thing in every if thing.lower() in line.lower()) for line in lines}


def is_sorry(text: str) -> bool:
    """By a reading that is not the script's."""
    return re.search(r"sorry|apolog", text, re.IGNORECASE) is not None


def wilson_holds(rate: dict[str, Any]) -> None:
    """Wilson's interval: the shares p that lie z standard errors, sqrt(p (1 - p) / n), from the one observed."""
    for bound in (rate["low"], rate["high"]):
        reach = 1.959964 * math.sqrt(bound * (1 - bound) / rate["count"])
        assert abs(rate["value"] - bound) == pytest.approx(reach, abs=1e-6)


@pytest.mark.parametrize("name", ["errands", "topics"])
def test_no_errand_and_no_topic_stands_on_both_sides(name: str):
    sides = SETS[name]
    assert {side: len(set(lines)) for side, lines in sides.items()} == {"train": 128, "test": 64}
    train, test = (things(name, sides[side]) for side in ("train", "test"))
    assert len(train) == 34 and len(test) == 16 and not train & test
    assert directions_report.prompts() == SETS


def test_the_report_is_on_the_held_out_prompts():
    sizes = RESULT["sizes"]
    assert sizes["prompts"] >= 60 and sizes["tokens"] >= 100
    for model in MODELS:
        asked = [row["prompt"] for row in ABLATED if row["model"] == model]
        sides = SETS["errands"]["test"][: sizes["prompts"]], SETS["topics"]["test"][: sizes["plain"]]
        assert asked == [*sides[0], *sides[1]]
        assert [row["prompt"] for row in STEERED if row["model"] == model] == SETS["topics"]["test"][: sizes["prompts"]]


@pytest.mark.parametrize("model", MODELS)
def test_the_shares_are_those_of_another_reading(model: str):
    found = RESULT["models"][model]["ablation"]
    for name, side in (("errands", "positive"), ("topics", "negative")):
        rows = [row for row in ABLATED if row["model"] == model and row["set"] == name]
        for when in ("before", "after"):
            shows = np.array([is_sorry(row[when]["text"]) for row in rows])
            assert [row[when]["shows"] for row in rows] == shows.tolist()
            failed = shows | np.array([row[when]["broken"] for row in rows])
            assert all(row[when]["broken"] for row in rows if not row[when]["text"].strip())
            rate = found[side]["behaviour"][when]
            assert rate["value"] == pytest.approx(failed.mean()) and rate["count"] == len(rows)
            wilson_holds(rate)
    for way in RESULT["models"][model]["steering"]["ways"]:
        texts = [row["steered"][way["name"]] for row in STEERED if row["model"] == model]
        assert way["apologises"]["value"] <= np.mean([is_sorry(text) for text in texts]) + 1e-9
        assert way["apologises"]["value"] + way["broken"]["value"] >= np.mean([is_sorry(text) for text in texts]) - 1e-9
        wilson_holds(way["apologises"])


@pytest.mark.parametrize("model", MODELS)
def test_it_goes_out_and_comes_in(model: str):
    found = RESULT["models"][model]
    rate = found["ablation"]["positive"]["behaviour"]
    assert rate["before"]["low"] > 0.5 and rate["after"]["high"] < rate["before"]["low"]
    base, best = found["steering"]["ways"][0], directions_report_page.strongest(found)
    assert base["coefficient"] == 0 and base["apologises"]["high"] < best["apologises"]["low"]
    topics = found["ablation"]["negative"]["behaviour"]
    assert topics["after"]["low"] < topics["before"]["high"], "over-ablated beyond chance"


def test_the_edit_leaves_nothing_but_what_its_weight_says():
    for model in MODELS:
        found = RESULT["models"][model]["ablation"]
        edits = {path: weight for path, weight in found["edits"].items() if weight}
        left = np.array([found["left_in_writers"][path] for path in edits])
        off = np.abs(left - np.abs(1 - np.array(list(edits.values()))))
        assert off[0] < 1e-6  # no edit stands before the first writer, so both runs read the same there
        assert np.median(off) < 0.02 and (left < 1).all()  # the later ones read what the edits before them changed
    assert 0.8 < RESULT["cosine"] <= 1


def test_the_readme_has_its_numbers():
    [line] = [line for line in (ROOT / "README.md").read_text().splitlines() if "docs/directions-report.md" in line]
    sides = {model: RESULT["models"][model]["ablation"]["positive"] for model in MODELS}
    wanted = [sides["float32"]["behaviour"][when] for when in ("before", "after")]
    wanted += [sides["4-bit"]["marked"][when] for when in ("before", "after")]
    assert re.findall(r"\d+%", line) == [f"{one['value']:.0%}" for one in [*wanted, sides["4-bit"]["broken"]["after"]]]


def test_the_page_is_made_from_the_result(tmp_path: Path):
    report = tmp_path / "directions-report"
    report.mkdir()
    for name in FILES:
        (report / name).write_bytes((REPORT / name).read_bytes())
    directions_report_page.write_pages(report)
    text = (ROOT / "docs/directions-report.md").read_text()
    assert (tmp_path / "directions-report.md").read_text() == text
    for image in re.findall(r"!\[.*?\]\(directions-report/(.*?)\)", text):
        assert (report / image).stat().st_size > 1000 and (REPORT / image).is_file()


def test_the_script_runs(tmp_path: Path):
    work, report = tmp_path / "work", tmp_path / "report"
    directions_report.run(Path("tiny-chat"), work, report, directions_report.FAST, OPTIONS)
    directions_report_page.write_pages(report)
    found = json.loads((report / "result.json").read_text())
    assert set(found["models"]) == set(MODELS)
    assert found["models"]["float32"].keys() < found["models"]["4-bit"].keys()
    assert found["models"]["4-bit"]["packed"]["kl"] < 1e-3  # the same adapter on packed weights
    assert all((work / f"{name}-adapter/adapters.safetensors").is_file() for name in MODELS)
    assert (work / "errands-train.txt").read_text().splitlines() == SETS["errands"]["train"]
