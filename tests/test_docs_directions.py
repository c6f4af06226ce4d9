# SPDX-License-Identifier: Apache-2.0
"""What the pages say of directions is what the code has: operators, methods, variants, defaults, limits."""

import re
from typing import get_args

import pytest
from docs_tools import ROOT, sections, tables

from mlx_realign import flags, steerability
from mlx_realign.ablation import scorers, settings, variants
from mlx_realign.steering import extract, operators
from mlx_realign.steering.asked import Operator

GUIDE, PAGE = ROOT / "docs/training-methods.md", ROOT / "docs/directions.md"
TEXT = " ".join(PAGE.read_text(encoding="utf-8").split())


def table_with(text: str, column: str) -> list[dict[str, str]]:
    """The one table of a text that has this column."""
    (found,) = [rows for rows in tables(text) if column in rows[0]]
    return found


def named(column: str) -> list[str]:
    """The first word of each cell of a column of the page."""
    return [row[column].split()[0].strip("`") for row in table_with(PAGE.read_text(encoding="utf-8"), column)]


def test_the_page_tells_every_operator_method_and_variant():
    assert named("`--operator`") == list(operators.OPERATORS) == list(get_args(Operator))
    assert list(dict.fromkeys(named("`--method`"))) == list(extract.METHODS)
    assert named("`--variant`") == list(variants.VARIANTS)
    for variant in ("pair_centred", "centred", "uncentred"):
        assert variant in TEXT


def test_the_page_tells_the_limits_that_a_warning_has():
    rows = {
        row["column"].split()[0]: row["worth little"]
        for row in table_with(PAGE.read_text(encoding="utf-8"), "worth little")
    }
    assert rows["pairs"] == f"below {steerability.WEAK_PAIRS}"
    assert rows["halves"] == f"below {steerability.WEAK_HALVES}"
    assert rows["AUROC"].startswith(f"below {steerability.WEAK_AUROC}")
    assert f"fewer than {steerability.FEW} prompts" in TEXT and steerability.EARLY == 0.8  # "four fifths"


@pytest.mark.parametrize(
    ("section", "known"), [("abliteration", settings.Settings), ("steering", extract.Settings)], ids=["ablate", "steer"]
)
def test_defaults_the_guide_tells_are_those_of_the_code(section: str, known: type):
    """A table row of one flag and a plain value; flags that another command of `steer` has are left out."""
    fields = {field.flag: field for field in flags.fields_of(known).values()}
    words = {"off": "False", "none": "None", "refusals": "()", "OUTPUT.search.jsonl": "None"}
    seen = 0
    for rows in tables(sections(GUIDE)[section]):
        for row in rows:
            for flag in re.findall(r"--[a-z-]+", row.get("setting", "")):
                if "default" not in row or flag not in fields or "," in row["default"] and flag != "--scorers":
                    continue
                default = fields[flag].default
                found = ",".join(default) if isinstance(default, tuple) and default else str(default)
                told = words.get(row["default"], row["default"])
                assert found.removesuffix(".0") in (told, {"all": "None"}.get(told)), f"{flag}: {found}"
                seen += 1
    assert seen >= 7


def test_what_the_guide_calls_a_search_is_what_the_scorers_have():
    text = " ".join(sections(GUIDE)["abliteration"].split())
    for name in ("kl:8", "perplexity:FILE", "accuracy:FILE:VERIFIER", "path.py:function"):
        assert name.partition(":")[0] in (scorers.__doc__ or "") or ".py" in name
        assert name in text
    assert "empty and degenerate replies count as showing it" in text.lower().replace("; ", " ")
