# SPDX-License-Identifier: Apache-2.0
"""Whether a Python program passes the tests of its row: 1 when it passes all of them, or their share with "partial".

The program is the last fenced block of Python behind the thinking, or the whole text where nothing is fenced. It runs
isolated (sandbox.py) and sees what goes into a test, never what should come out (code_tests.py). A program that fails
by more than a wrong answer is refused with the reason. A row may have "time_limit_s", seconds for each test (2 unless
given, at most 4); all tests together have 5 seconds.
"""

from typing import Any

from . import code_tests, sandbox
from .answers import Refused, after_thinking

TIMEOUT_S = 7.0  # beyond the sandbox's own 5, so that its end is in order
COST_S = 0.2
TEST_S, MOST_TEST_S = 2.0, 4.0
ARGUMENTS = ("", "partial")
LANGUAGES = ("", "python", "py", "python3", "{python}", "{.python}")


def verify(completion: str, row: dict[str, Any], argument: str = "") -> float | None:
    """1 where all tests pass, else 0; their share with the argument "partial". None where the row has no "tests".

    Refused: "unparsed" without a program, "no_isolation", or the first failure that is no wrong answer: "syntax",
    "raised", "timeout", "memory", "output", "died".
    """
    if row.get("tests") is None:
        return None
    cases = code_tests.read(row)
    code = extract(completion)
    if code is None:
        raise Refused("unparsed")
    seconds = float(row.get("time_limit_s", TEST_S))
    words = []
    try:
        with sandbox.program(code) as ask:
            for case in cases:
                words.append(_word(case, ask(case.mode, case.text, seconds)))
                if words[-1] == "syntax" or (argument != "partial" and words[-1] != "passed"):
                    break
    except sandbox.NoIsolation as error:
        raise Refused("no_isolation") from error
    except TimeoutError as error:  # on a machine so busy that not even the sandbox starts
        raise Refused("timeout") from error
    share = words.count("passed") / len(cases)
    if share == 1.0 or (share > 0 and argument == "partial"):
        return share
    failures = [word for word in words if word not in ("passed", "wrong")]
    if failures:
        raise Refused(failures[0])
    return 0.0


def _word(case: code_tests.Case, outcome: sandbox.Outcome) -> str:
    if outcome.status != "ok":
        return outcome.status
    return "passed" if code_tests.passed(case, outcome) else "wrong"


def check(row: dict[str, Any], argument: str = "") -> str | None:
    """What is wrong with the row: its tests or its time limit."""
    try:
        code_tests.read(row)
    except ValueError as error:
        return str(error)
    limit = row.get("time_limit_s", TEST_S)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit <= MOST_TEST_S:
        return f'"time_limit_s" is {limit!r}; expected seconds for each test, more than 0 and at most {MOST_TEST_S:g}'
    return check_argument(argument)


def check_argument(argument: str) -> str | None:
    """What is wrong with the argument; or that nothing on this machine confines programs."""
    if argument not in ARGUMENTS:
        return f'code takes "partial" or no argument, not {argument!r}'
    return sandbox.refusal()


def extract(completion: str) -> str | None:
    """The program in a completion: the last fenced block of Python, else the whole text where it has no fence at all.

    None where there is none. A fence that is never closed ends with the text.
    """
    text = after_thinking(completion)
    found: list[str] | None = None
    block: list[str] | None = None
    fence, indent, fenced = "", 0, False
    for line in text.split("\n"):
        ticks, language = _fence(line)
        if fence and ticks.startswith(fence) and not language:
            found, fence, block = (found if block is None else block), "", None
        elif fence:
            if block is not None:
                block.append(line[min(indent, len(line) - len(line.lstrip(" "))) :])
        elif ticks:
            fenced, fence, indent = True, ticks, len(line) - len(line.lstrip(" "))
            block = [] if language in LANGUAGES else None
    lines = (found if block is None else block) if fenced else text.split("\n")
    code = "\n".join(lines or []).rstrip("\r\n")
    return code if code.strip() else None


def _fence(line: str) -> tuple[str, str]:
    """(the fence, the language behind it) where a line is one of Markdown's fences, else ("", "")."""
    text = line.strip()
    mark = text[:1]
    ticks = text[: len(text) - len(text.lstrip(mark))] if mark in ("`", "~") and mark else ""
    rest = text[len(ticks) :].strip()
    if len(ticks) < 3 or (mark == "`" and "`" in rest):
        return "", ""
    return ticks, rest.split()[0].lower() if rest else ""
