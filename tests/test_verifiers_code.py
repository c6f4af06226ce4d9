# SPDX-License-Identifier: Apache-2.0
"""The verifier `code`: which text is the program, how tests are read and compared, what the scores are."""

import json
import sys
import time

import pytest

from mlx_realign.verifiers import Refused, code, code_tests, sandbox, sandbox_play

ADD = "def add(a, b):\n    return a + b\n"
LINUX = sys.platform == "linux"
needs_isolation = pytest.mark.skipif(sandbox.isolation() is None, reason="nothing here confines programs")


def fenced(text: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{text.rstrip()}\n```\nDone."


def score(program: str, *tests: object, argument: str = "", **row: object) -> float | str | None:
    """The score, or the reason of a refusal."""
    try:
        return code.verify(fenced(program), {"tests": list(tests), **row}, argument)
    except Refused as refused:
        return refused.reason


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (fenced("x = 1\n"), "x = 1"),
        (fenced("x = 1\n", ""), "x = 1"),
        (fenced("x = 1\n", "Python3"), "x = 1"),
        (fenced("a = 1\n") + fenced("b = 2\n", "py"), "b = 2"),
        (fenced("a = 1\n") + fenced("$ run it\n", "bash"), "a = 1"),  # what it prints comes last, and is no program
        ("```python\nx = 1\nif x:\n    y", "x = 1\nif x:\n    y"),  # cut off by the limit on tokens
        ("~~~py\nx = '```'\n~~~", "x = '```'"),
        ("````python\n```\nx\n```\n````", "```\nx\n```"),
        ("1. First:\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b"),
        ("def f():\n    return 1\n", "def f():\n    return 1"),
        ("<think>```python\nwrong\n```</think>```python\nright\n```", "right"),
        ("```js\nlet x\n```", None),
        ("```python\n\n```", None),
        ("", None),
    ],
)
def test_the_program_is_the_last_fenced_python_or_the_whole_text(text: str, program: str | None):
    assert code.extract(text) == program


def test_thinking_that_never_ends_holds_no_program():
    with pytest.raises(Refused, match="unfinished"):
        code.extract("<think>" + fenced(ADD))


def test_looking_for_the_program_takes_linear_time():
    for text in ("```" + "a" * 50_000 + "`", "`" * 50_000 + "x`", "```\n" * 12_000, " " * 50_000 + "```"):
        start = time.perf_counter()
        code.extract(text)
        assert time.perf_counter() - start < 2  # quadratic time would be minutes


@pytest.mark.parametrize(
    ("text", "call", "rule", "expected"),
    [
        ("assert f(2) == 4", "f(2)", "python", 4),
        ("assert 4 == f(2)", "f(2)", "python", 4),
        ("assert f('a', [1]) == (1, -2.5), 'message'", "f('a', [1])", "python", (1, -2.5)),
        ("assert set(f(1)) == set([1, 2])", "set(f(1))", "python", {1, 2}),
        ("assert f(1) == float('inf')", "f(1)", "python", float("inf")),
        ("assert f(1) is None", "f(1)", "is", None),
        ("assert f(1) == True", "f(1)", "python", True),
        ("assert f(1)", "bool(f(1))", "python", True),
        ("assert not s.f(1)", "bool(s.f(1))", "python", False),
        ("assert f(1) in (1, 2)", "f(1)", "in", (1, 2)),
        ("assert abs(f(1) - 0.5) < 1e-6", "f(1)", "close", 0.5),
        ("assert math.isclose(f(1), 0.5, rel_tol=0.01)", "f(1)", "close", 0.5),
    ],
)
def test_asserts_are_taken_apart(text: str, call: str, rule: str, expected: object):
    found = code_tests.read({"tests": [text]})[0]
    assert (found.mode, found.text, found.rule, found.expected) == ("call", call, rule, expected)
    assert type(found.expected) is type(expected)


@pytest.mark.parametrize(
    "text",
    [
        "assert f(1) == g(1)",
        "assert f(1) != 2",
        "assert f(1) > 2",
        "assert (f(1) == 2) == True",  # the outcome of a comparison is easy to forge
        "assert all(x == 1 for x in f(3))",
        "assert isinstance(f(1), int)",
        "assert f(1) == 2 and f(2) == 3",
        "assert 1 == 1",
        "assert f(1) is 5",
        "x = f(1)",
        "assert f(1) == 2; f = None",
        "assert f(",
        {"input": "1"},
        {"input": 1, "output": "1"},
        {"call": "f(1) == 2", "expected": True},
        {"call": "3", "expected": 3},
        {"call": "f(", "expected": 3},
        {"call": "f(1)", "expected": 3, "output": "3"},
        5,
    ],
)
def test_what_the_program_itself_would_judge_is_a_bad_row(text: object):
    assert "tests[1]: " in (code.check({"tests": ["assert f(1) == 2", text]}) or "")


def test_rows_that_cannot_be_judged_are_named():
    assert "list of one or more" in (code.check({"tests": []}) or "")
    assert "time_limit_s" in (code.check({"tests": ["assert f(1) == 2"], "time_limit_s": 60}) or "")
    assert "'half'" in (code.check({"tests": ["assert f(1) == 2"]}, "half") or "")
    assert code.verify("x = 1", {"answer": "5"}) is None


SAME = [  # value, expected, equal as JSON, equal as Python
    (4, 4, True, True),
    (4, 5, False, False),
    (4.0, 4, True, True),
    (True, 1, False, True),
    (None, False, False, False),
    (None, 0, False, False),
    (0.1 + 0.2, 0.3, True, False),
    (0.3001, 0.3, False, False),
    (float("nan"), 0.0, False, False),
    (2**200, 2**200, True, True),
    (-(2**200), 2**200, False, False),
    ("4", 4, False, False),
    ('é\n"\\\ud800', 'é\n"\\\ud800', True, True),
    (b"ab", b"ab", True, True),
    (b"ab", "ab", False, False),
    (1j, 1j, True, True),
    ([1, [2]], [1, [2]], True, True),
    ([1, 2], [1, 2, 3], False, False),
    ((1, 2), [1, 2], True, False),
    ((1, (2,)), (1, (2,)), False, True),
    ([1, 2], (1, 2), False, False),
    ({1, 2}, {2, 1}, True, True),
    ({(1, 2), frozenset([3])}, {(1, 2), frozenset([3])}, True, True),
    ({1, 2}, {1, 3}, False, False),
    ({1: "a"}, {"1": "a"}, True, False),
    ({"a": 1, "b": [2]}, {"b": [2], "a": 1}, True, True),
    ({"a": 1}, {"a": 1, "b": 2}, False, False),
    ({(1, 2): 3}, {(1, 2): 3}, False, True),
    ({None: 1, True: 2}, {"null": 1, "true": 2}, True, False),
    (object(), 0, False, False),
    (range(2), [0, 1], False, False),
    ([object()], [None], False, False),
]


@pytest.mark.parametrize(("value", "expected", "as_json", "as_python"), SAME, ids=lambda x: repr(x).split(" at ")[0])
def test_values_are_compared_outside_by_what_they_are(value: object, expected: object, as_json: bool, as_python: bool):
    sent = json.loads(sandbox_play.encode(value, [1000]))
    try:
        found = [code_tests.same(sent, expected, how) for how in (True, False)]
    except TypeError:  # a key that is no JSON key
        found = [False, code_tests.same(sent, expected, False)]
    assert found == [as_json, as_python]
    assert as_python == (value == expected)  # Python says the same


def test_the_subclasses_of_builtin_types_arrive_as_those():
    from collections import Counter, OrderedDict, defaultdict, namedtuple
    from enum import IntEnum

    values = Counter("aab"), OrderedDict(a=2, b=1), defaultdict(int, a=2, b=1)
    assert all(code_tests.same(json.loads(sandbox_play.encode(x, [100])), {"a": 2, "b": 1}, False) for x in values)
    assert sandbox_play.encode(namedtuple("P", "x y")(1, 2), [10]) == '["t",1,2]'
    assert sandbox_play.encode(IntEnum("E", "one two")(2), [10]) == "2"


def test_endless_values_end():
    loop: list[object] = []
    loop.append(loop)
    assert sandbox_play.encode(loop, [1000]).count("[") == sandbox_play.DEEPEST + 1
    wide: list[object] = []
    for _ in range(50):
        wide = [wide, wide]
    with pytest.raises(OverflowError):
        sandbox_play.encode(wide, [1000])


@pytest.mark.parametrize(
    "answer",
    [b"", b"4 4", b"[" * 999, b'["d",1]', b'["d",["l"],1]', b'["i"]', b'["i",5]', b'["s",["l"]]', b"9" * 9000, b"\xff"],
)
def test_nonsense_from_the_sandbox_is_a_wrong_answer(answer: bytes):
    for expected in (4, [4], {4}, {4: 4}, "4"):
        case = code_tests.Case("call", "f()", "python", expected)
        assert not code_tests.passed(case, sandbox.Outcome("ok", b"", answer))


@pytest.mark.parametrize(
    ("output", "expected", "equal"),
    [
        (b"5\n", "5", True),
        (b"5  \n6\t\n\n", "5\n6\n", True),
        (b"5\r\n6\r\n", "5\n6", True),
        (b"5\n6\n", "5\n", False),
        (b"5\n", "5\n6\n", False),
        (b"\n5\n", "5\n", False),
        (b" 5\n", "5\n", False),
        (b"5\xff", "5", False),
        (b"", "", True),
    ],
)
def test_outputs_are_compared_whole(output: bytes, expected: str, equal: bool):
    assert code_tests.same_output(output, expected) is equal


ORDINARY = """
=== 6
import sys
def main():
    print(sum(map(int, sys.stdin)))
if __name__ == "__main__":
    main()
=== 1 2 3
import atexit, io, os
out = io.StringIO()
atexit.register(lambda: os.write(1, out.getvalue().encode()))
for line in open(0):
    out.write(line.strip() + " ")
=== 20000
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(1 << 26)
def f(n):
    return 0 if n == 0 else 1 + f(n - 1)
thread = threading.Thread(target=lambda: print(f(20000)))
thread.start()
=== 7
import asyncio
async def f():
    await asyncio.sleep(0.001)
    return 7
print(asyncio.run(f()))
=== P(x=3)
from dataclasses import dataclass
@dataclass
class P:
    x: int
print(P(3))
=== 2.10 64 0.5
import decimal, hashlib, statistics
print(decimal.Decimal("1.10") + 1, len(hashlib.sha256(b"").hexdigest()), statistics.mean([0, 1]))
=== 5
import sys
print(5)
sys.exit()
=== 3
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(2) as pool:
    print(sum(pool.map(abs, [-1, 2])))
=== True é 1970
import datetime
print({"b", "a"} == {"a", "b"}, "é", datetime.datetime.strptime("1970", "%Y").year)
"""


@needs_isolation
def test_ordinary_ways_to_write_a_program_work():
    for part in ORDINARY.split("=== ")[1:]:
        output, _, program = part.partition("\n")
        assert score(program, {"input": "1\n2\n3\n", "output": output}) == 1, program


@needs_isolation
def test_scores_and_reasons():
    three = [{"call": f"add({n}, 1)", "expected": n + 1} for n in range(3)]
    wrong_once = "def add(a, b):\n    return 9 if a == 1 else a + b\n"
    assert score(wrong_once, *three) == 0
    assert score(wrong_once, *three, argument="partial") == pytest.approx(2 / 3)
    slow_once = "def add(a, b):\n    while a == 1: pass\n    return a + b\n"
    assert score(slow_once, *three, argument="partial", time_limit_s=0.3) == pytest.approx(2 / 3)
    assert score("def add(a, b):\n    while True: pass\n", *three, time_limit_s=0.3) == "timeout"
    assert score("def add(a, b):\n    return [0] * (a + 1) * 10**10\n", *three) == "memory"
    assert score("def add(a, b:\n", *three) == "syntax"
    assert score("def add(a, b):\n    return a.b\n", *three) == "raised"
    assert score("import ctypes\nctypes.string_at(0)", *three) == "died"
    assert score("print('x' * 2**21)", {"input": "", "output": "x"}) in ("output", "raised")
    assert score("raise SystemExit(1)", {"input": "", "output": ""}) == "raised"
    with pytest.raises(Refused, match="unparsed"):
        code.verify("```js\nx\n```", {"tests": three})


@needs_isolation
def test_tests_do_not_see_each_other():
    keeps = "seen = []\ndef f(x):\n    seen.append(x)\n    return len(seen)\n"
    assert score(keeps, *[{"call": f"f({n})", "expected": 1} for n in range(4)]) == 1
    count = "import os\nprint(len(os.listdir('.')))\nopen('left', 'w').close()"
    if sandbox.route().name != "calls":
        assert score(count, *[{"input": "", "output": "0"}] * 3) == 1


@needs_isolation
def test_a_program_gives_the_same_output_in_every_run():
    program = "print({str(n) for n in range(50)})"
    with sandbox.program(program) as ask:
        first = ask("stdin", "", 2.0).output
    with sandbox.program(program) as ask:
        assert ask("stdin", "", 2.0).output == first and len(first) > 100


@needs_isolation
def test_what_should_come_out_never_goes_in(monkeypatch: pytest.MonkeyPatch):
    """Everything that is sent into the sandbox, recorded: the expected values are not in it."""
    sent: list[str] = []
    say = sandbox._say
    monkeypatch.setattr(sandbox, "_say", lambda process, message: (sent.append(repr(message)), say(process, message)))
    tests = [
        {"input": "1", "output": "40961"},
        {"call": "f(1)", "expected": {"deep": [40962]}},
        "assert f(1) == 40963",
        "assert f(1) in (40964, 40964)",
        "assert abs(f(1) - 40965) < 1e-4096",
        "assert math.isclose(40966, f(1), abs_tol=4096)",
    ]
    assert score("def f(x):\n    return x\n", *tests, argument="partial") == pytest.approx(0)
    assert sum("f(1)" in text for text in sent) == 5
    assert not [text for text in sent if "4096" in text]
