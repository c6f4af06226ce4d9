# SPDX-License-Identifier: Apache-2.0
"""What the pages say of policy gradients and verifiers is what the code has: losses, choices, times, reasons, rates."""

import json
import re
from typing import get_args, get_type_hints

import pytest
from docs_tools import ROOT, sections, tables

from mlx_realign import config, policy_gradient, verifiers
from mlx_realign.methods import grpo
from mlx_realign.verifiers import constraints, sandbox_play

GUIDE, SKILL = ROOT / "docs/training-methods.md", ROOT / ".claude/skills/training-methods.md"
VERIFIERS = (ROOT / "docs/verifiers.md").read_text(encoding="utf-8")
SOURCES = {path.stem: path.read_text(encoding="utf-8") for path in (config.PACKAGE / "verifiers").glob("*.py")}


def table_with(text: str, column: str) -> list[dict[str, str]]:
    """The one table of a text that has this column."""
    (found,) = [rows for rows in tables(text) if column in rows[0]]
    return found


def test_the_guide_tells_every_policy_gradient_loss_with_its_clip_and_its_paper():
    told = table_with(sections(GUIDE)["grpo"], "paper")
    names = [row["`--loss-type`"].strip("`") for row in told]
    assert sorted(names) == sorted(policy_gradient.names())
    for row, loss in zip(told, names, strict=True):
        options = policy_gradient.options(loss)
        clip = [f"{options[key]:g}" for key in ("clip_low", "clip_high") if key in options]
        assert row["clip"] == ", ".join(clip), loss
        doc = policy_gradient.find(loss).__doc__ or ""
        assert row["paper"].removeprefix("arXiv:") in doc, f"{loss}: policy_gradient.py names another paper"
    assert set(names) <= set(re.findall(r"\w+", sections(SKILL)["grpo"]))


@pytest.mark.parametrize("setting", ["advantage", "behaviour"])
def test_the_guide_tells_every_choice_of_a_setting(setting: str):
    column = f"`--{setting}`"
    choices = {row[column].split()[0].strip("`") for row in table_with(sections(GUIDE)["grpo"], column)}
    assert choices == set(get_args(get_type_hints(grpo.Config)[setting]))


def test_every_verifier_is_told_with_its_time():
    told = {re.findall(r"\w+", row["name"])[0]: row for row in table_with(VERIFIERS, "seconds")}
    assert sorted(told) == verifiers.names()
    assert set(told) <= set(re.findall(r"^### (\w+)$", VERIFIERS, re.MULTILINE))
    assert set(told) <= set(re.findall(r"\w+", sections(GUIDE)["rlvr"]))
    for name, row in told.items():
        seconds = re.search(r"^TIMEOUT_S = ([\d.]+)", SOURCES[name], re.MULTILINE)
        assert float(row["seconds"]) == float(seconds[1] if seconds else verifiers.specs.TIMEOUT_S), name
        assert row["judges"].startswith("form:") == ("\nSHAPING = True" in SOURCES[name]), name


def test_every_kind_of_constraint_is_told():
    assert set(constraints.kinds()) <= set(re.findall(r"`(\w+)`", VERIFIERS))


def test_every_reason_of_a_refusal_is_told():
    named = {word for row in table_with(VERIFIERS, "reason") for word in re.findall(r"`(\w+)`", row["reason"])}
    given = {word for text in SOURCES.values() for word in re.findall(r"""(?:Refused|_fail)\("(\w+)"\)""", text)}
    ends = {"timeout", "memory", "died", "error", "too_long", "not_reached", "forbidden"}
    assert named == given | ends | set(sandbox_play.STATUSES) - {"ok"}


def test_the_rates_are_of_the_corpus_there_is():
    counts = {}
    for path in (ROOT / "tests/verifier_cases").glob("*.jsonl"):
        cases = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        counts[path.stem] = (len(cases), sum(case["expected"] == 1.0 for case in cases))
    counts["all"] = tuple(map(sum, zip(*counts.values(), strict=True)))
    told = table_with(VERIFIERS, "false negatives")
    assert {row["verifier"]: (int(row["cases"]), int(row["right"])) for row in told} == counts
