# SPDX-License-Identifier: Apache-2.0
"""demo: the table says what was measured, and a quick run trains through the real command and leaves its files."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from mlx_realign import cli, demo
from mlx_realign import demo_world as world


def test_every_row_moves_and_keeps_measures_that_exist():
    measures = world.held_out(count=2)
    for name, row in demo.ROWS.items():
        assert {row.goal, *row.keeps} <= set(measures), name
        assert row.goal not in row.keeps, name


def test_the_table_holds_before_after_and_seconds():
    before, after = {"polite": 0.04, "sums right": 0.41}, {"polite": 0.97, "sums right": 0.405}
    result = demo.Result("dpo", "prefers the polite voice", "polite", before, after, train_s=8.0, seconds=12.4)
    out = io.StringIO()
    Console(file=out, width=120).print(demo.table([result]))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert any({"dpo", "4%", "97%", "12"} <= set(line) for line in lines)
    assert any({"keeps", "sums", "41%", "40%"} <= set(line) for line in lines)


def test_a_quick_run_trains_by_command_and_reports_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.run(demo.main, ["--quick", "--json", "--methods", "sft", "--output", str(tmp_path)]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["method"] == "sft"
    assert set(result["before"]) == set(result["after"]) == {"sums right", "facts right"}
    assert all(0 <= share <= 1 for share in [*result["before"].values(), *result["after"].values()])
    assert (tmp_path / "sft/adapters.safetensors").is_file()
    assert len((tmp_path / "sft/train.jsonl").read_text().splitlines()) == 16


@pytest.mark.parametrize(
    ("row", "made"),
    [
        pytest.param("abliteration", "adapter/adapters.safetensors", marks=pytest.mark.slow),
        ("steering", demo.DIRECTION),
    ],
)
def test_rows_of_other_commands_leave_their_files_too(tmp_path: Path, capsys: pytest.CaptureFixture[str], row, made):
    assert cli.run(demo.main, ["--quick", "--json", "--methods", row, "--output", str(tmp_path)]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["before"]) == set(result["after"]) >= {demo.ROWS[row].goal, *demo.ROWS[row].keeps}
    assert (tmp_path / row / made).is_file()
    if row == "steering":
        off = demo.OFF.format("grey mood")
        assert result["before"][off] == result["after"][off] == result["before"]["grey mood"]


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]):
    assert cli.run(demo.main, ["--methods", "sft,magic"]) == 2
    assert "magic" in capsys.readouterr().err
