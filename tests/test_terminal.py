# SPDX-License-Identifier: Apache-2.0
"""What acts on a terminal is shown by name there, and goes into files as it is."""

import io
import json
import re
import sys

import pytest
from rich.table import Table
from rich.text import Text

from mlx_realign import cli
from mlx_realign.data import show
from mlx_realign.errors import UserError
from mlx_realign.progress import Reporter
from mlx_realign.terminal import Console, Shown, visible

EVIL = "a\x1b]0;title\x07\x1b[2Jb\r\x9bc\u202ed\x7f\ud800"
SHOWN = r"a\x1b]0;title\x07\x1b[2Jb\r\x9bc\u202ed\x7f\ud800"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_acts_on_a_terminal_is_written_as_an_escape_and_letters_are_not():
    assert visible(EVIL) == SHOWN
    letters = "\t\n é 漢字 עברית \u200d🏳️‍🌈 \\x1b"
    assert visible(letters) == letters


@pytest.mark.parametrize("screen", [True, False])
def test_rich_shows_texts_so_in_lines_tables_and_bars_but_its_own_colours_act(screen):
    out = Screen() if screen else io.StringIO()
    console = Console(file=out, width=200, force_terminal=screen, color_system="standard" if screen else None)
    table = Table("x")
    table.add_row(Text("\x1b[2J"))
    console.print(Text("\x1b[2J", "bold"), table)
    bold = "\x1b[1m\\x1b[2J\x1b[0m"
    assert (bold in out.getvalue()) == screen
    assert ("\x1b[2J" in out.getvalue()) != screen


def test_a_run_shows_what_it_says_and_why_it_ends(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Screen())

    def main(argv: list[str]) -> int:
        Reporter().say(EVIL[:-1])
        print(EVIL)
        raise UserError(EVIL)

    out, err = sys.stdout, sys.stderr
    assert cli.run(main, []) == 2
    assert (sys.stdout, sys.stderr) == (out, err)
    assert isinstance(out, Screen) and isinstance(err, Screen)
    assert out.getvalue().split("\n")[-2] == SHOWN and "\x1b" not in out.getvalue()
    assert err.getvalue() == f"error: {SHOWN}\n"


def test_pipes_and_files_get_texts_as_they_are(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli.run(lambda _: print(EVIL), []) == 0
    assert isinstance(sys.stdout, io.StringIO) and sys.stdout.getvalue() == EVIL + "\n"


def test_a_fault_of_the_program_is_shown_so_too(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)

    def main(argv: list[str]) -> int:
        raise ValueError(EVIL)

    with pytest.raises(ValueError) as error:
        cli.run(main, [])
    for screen, shown in ((Screen(), SHOWN), (io.StringIO(), EVIL)):
        monkeypatch.setattr(sys, "stderr", screen)
        sys.excepthook(ValueError, error.value, None)
        assert screen.getvalue() == f"ValueError: {shown}\n"


def test_what_the_output_has_no_word_for_ends_no_command(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.run(lambda _: print(json.dumps({"text": "é\ud800"}, ensure_ascii=False)), []) == 0
    out.flush()
    assert out.buffer.getvalue() == b'{"text": "\\xe9\\ud800"}\n'  # type: ignore[attr-defined]


def test_shown_rows_act_on_no_terminal():
    out = Screen()
    completion = {"runs": [{"text": EVIL, "trained": True}], "mask": [True]}
    rows = [{"line": 1, "prompt": EVIL, "prompt_tokens": 1, "completions": [completion]}, {"line": 2, "error": EVIL}]
    show.write(rows, Console(file=out, force_terminal=True, color_system="standard", width=200))
    text = re.sub(r"\x1b\[[\d;]*m", "", out.getvalue())  # colours
    assert text.count(SHOWN.replace(r"\x07", "").replace(r"\r", "")) == 3  # rich leaves out BEL and CR
    assert not re.search(r"[\x1b\x07\r\x7f\x80-\x9f\u202e]", text)


def test_bars_of_downloads_go_on_moving_on_standard_error_alone():
    for bars in (True, False):
        out = Screen()
        stream = Shown(out, bars=bars)
        for text in ("\r 40%|████ | 4/10", "\x1b[A", "\r 40% \x1b[2J"):
            stream.write(text)
        assert out.getvalue().startswith("\r 40%|████ | 4/10\x1b[A") == bars
        assert "\x1b[2J" not in out.getvalue()
