# SPDX-License-Identifier: Apache-2.0
r"""Tests of a row for the verifier `code`: what goes into the sandbox, and the comparison that stays outside of it.

A row's "tests" is a list; each entry is one of

    {"input": "2 3\n", "output": "5\n"}           the program as a script: its whole output must be this one
    {"call": "add(2, 3)", "expected": 5}          an expression after the program: its value must be this JSON value
    "assert add(2, 3) == 5"                       as they stand in MBPP and HumanEval: taken apart into the call, which
                                                  goes inside, and the literal, which does not

The expected value never enters the sandbox. An assert of another form could only be run inside, by the side that is
being judged: such a row is refused unless it has "trusted_asserts": true. The same holds for a comparison whose outcome
is expected: a program can make every comparison inside come out true, and cannot guess what a call should give.
"""

import ast
import builtins
import json
import math
from typing import Any, NamedTuple

from .sandbox import Outcome

FORMS = 'expected {"input", "output"}, {"call", "expected"} or "assert call == value"'
_COMPARING = (ast.Compare, ast.BoolOp, ast.IfExp, ast.Lambda, ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)


class Case(NamedTuple):
    """One test: `mode` and `text` are for the sandbox, `rule` and what follows for `passed`."""

    mode: str
    text: str
    rule: str
    expected: Any = None
    relative: float = 0.0
    absolute: float = 0.0


def read(row: dict[str, Any]) -> list[Case]:
    """The tests of a row. Raises ValueError saying which one is of no form known here."""
    tests, trusted = row.get("tests"), row.get("trusted_asserts") is True
    if not isinstance(tests, list) or not tests:
        raise ValueError('"tests" must be a list of one or more tests')
    found = []
    for i, test in enumerate(tests):
        try:
            found.append(_read_assert(test, trusted) if isinstance(test, str) else _read(test))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"tests[{i}]: {error}") from error
    return found


def _read(test: Any) -> Case:
    if isinstance(test, dict) and set(test) == {"input", "output"}:
        if not isinstance(test["input"], str) or not isinstance(test["output"], str):
            raise ValueError('"input" and "output" must be text')
        return Case("stdin", test["input"], "output", test["output"])
    if isinstance(test, dict) and set(test) == {"call", "expected"}:
        if not isinstance(test["call"], str):
            raise ValueError('"call" must be text, as "f(1, 2)"')
        call = ast.parse(test["call"], mode="eval").body
        if not _computes(call):
            raise ValueError(f'"call" is no call: {test["call"][:80]!r}')
        if isinstance(test["expected"], bool) and not _plain_call(call):
            raise ValueError(f"the program would compare: {test['call'][:80]!r}; give the call alone and its value")
        return Case("call", test["call"], "json", test["expected"])
    raise ValueError(FORMS)


def _read_assert(text: str, trusted: bool) -> Case:
    statements = ast.parse(text.strip()).body
    if len(statements) == 1 and isinstance(statements[0], ast.Assert):
        found = _taken_apart(statements[0].test)
        if found:
            return found
    if trusted:
        return Case("assert", text, "ran")
    raise ValueError(
        f"cannot be judged outside of the program: {text.strip()[:80]!r}. Expected assert call == value (or: is None, "
        f'in (...), not call, abs(call - value) < limit); "trusted_asserts": true in the row runs it inside'
    )


def _taken_apart(node: ast.expr) -> Case | None:
    """An assert's expression as a call and what its value must be. The two sides may stand either way round."""
    expected = True
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        node, expected = node.operand, False
    if not isinstance(node, ast.Compare):
        near = _near(node) if expected else None
        return near or (Case("call", f"bool({ast.unparse(node)})", "python", expected) if _plain_call(node) else None)
    if len(node.ops) != 1 or not expected:
        return None
    left, right, operator = node.left, node.comparators[0], node.ops[0]
    if isinstance(operator, ast.Lt | ast.LtE):
        return _within(left, right)
    if isinstance(operator, ast.Eq) and _computes(right):
        left, right = right, left
    rule = {ast.Eq: "python", ast.Is: "is", ast.In: "in"}.get(type(operator))
    if rule is None or not _computes(left) or _computes(right):
        return None
    value = literal(right)
    fits = {
        "python": not isinstance(value, bool) or _plain_call(left),
        "is": value is None or (isinstance(value, bool) and _plain_call(left)),
        "in": isinstance(value, str | list | tuple | set | frozenset | dict),
    }
    return Case("call", ast.unparse(left), rule, value) if fits[rule] else None


def _within(left: ast.expr, right: ast.expr) -> Case | None:
    """abs(call - value) < limit."""
    if not (isinstance(left, ast.Call) and isinstance(left.func, ast.Name) and left.func.id == "abs" and left.args):
        return None
    inner = left.args[0]
    if not (isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Sub)):
        return None
    call, value = (inner.right, inner.left) if _computes(inner.right) else (inner.left, inner.right)
    return _close(call, value, None, right)


def _near(node: ast.expr) -> Case | None:
    """math.isclose(call, value, rel_tol=..., abs_tol=...), with or without math."""
    if not isinstance(node, ast.Call) or len(node.args) != 2:
        return None
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    limits = {keyword.arg: keyword.value for keyword in node.keywords}
    if name != "isclose" or not set(limits) <= {"rel_tol", "abs_tol"}:
        return None
    call, value = node.args if _computes(node.args[0]) else node.args[::-1]
    return _close(call, value, limits.get("rel_tol", ast.Constant(1e-9)), limits.get("abs_tol"))


def _close(call: ast.expr, value: ast.expr, relative: ast.expr | None, absolute: ast.expr | None) -> Case | None:
    """A call whose value must be near a number; None where what should be literal numbers are not."""
    numbers = [ast.Constant(0.0) if node is None else node for node in (value, relative, absolute)]
    if not _computes(call) or any(map(_computes, numbers)):
        return None
    given = [literal(node) for node in numbers]
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in given):
        return None
    return Case("call", ast.unparse(call), "close", *given)


def _computes(node: ast.expr) -> bool:
    """Whether the value is the program's to say: anything that is no literal."""
    try:
        literal(node)
    except (ValueError, TypeError, SyntaxError):
        return True
    return False


def _plain_call(node: ast.expr) -> bool:
    """A call of something the program defines, with nothing in it that compares: then true and false are answers."""
    if not isinstance(node, ast.Call) or any(isinstance(inner, _COMPARING) for inner in ast.walk(node)):
        return False
    return not (isinstance(node.func, ast.Name) and hasattr(builtins, node.func.id))


def literal(node: ast.expr) -> Any:
    """The value of a literal; set(...), frozenset(...), tuple(...), list(...) of one and float("inf") are literals too.

    Raises ValueError for anything else.
    """
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords and len(node.args) <= 1:
        made = {"set": set, "frozenset": frozenset, "tuple": tuple, "list": list, "float": float}.get(node.func.id)
        if made is not None:
            return made(*(literal(argument) for argument in node.args))
    return ast.literal_eval(node)


def passed(case: Case, outcome: Outcome) -> bool:
    """Whether what came out of the sandbox is what the test expects. Whatever came out, this raises nothing."""
    if outcome.status != "ok":
        return False
    if case.rule == "output":
        return same_output(outcome.output, case.expected)
    if case.rule == "ran":
        return outcome.result == b"true"
    try:
        return _fits(case, json.loads(outcome.result))
    except (ValueError, TypeError, LookupError, RecursionError, MemoryError, OverflowError):
        return False


def _fits(case: Case, value: Any) -> bool:
    if case.rule == "is":
        return value is case.expected
    if case.rule == "in":
        if isinstance(case.expected, str):
            return isinstance(value, str) and value in case.expected
        return any(same(value, option, False) for option in case.expected)
    if case.rule == "close":
        number = plain(value)
        if isinstance(number, bool) or not isinstance(number, int | float):
            return False
        return math.isclose(number, case.expected, rel_tol=case.relative, abs_tol=case.absolute)
    return same(value, case.expected, case.rule == "json")


def same_output(output: bytes, expected: str) -> bool:
    """The same lines, none more and none fewer; white space at their ends and empty lines at the end do not count."""
    try:
        return _lines(output.decode()) == _lines(expected)
    except UnicodeDecodeError:
        return False


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def same(value: Any, expected: Any, as_json: bool) -> bool:
    """A value as sandbox_play.encode wrote it (read by json) against an expected one.

    `as_json`: expected is JSON: tuples are lists, keys are text, true is not 1, numbers that are no integers agree to
    1e-9. Else as Python's == on builtin values. Guided by `expected`, so that the work is bounded by what a row holds.
    """
    if not isinstance(value, list):
        return _same_scalar(value, expected, as_json)
    kind, *parts = value
    if kind in ("l", "t"):
        fits = isinstance(expected, list if as_json or kind == "l" else tuple) and len(parts) == len(expected)
        return fits and all(same(part, wanted, as_json) for part, wanted in zip(parts, expected, strict=True))
    if kind == "s":
        fits = isinstance(expected, set | frozenset) and len(parts) == len(expected)
        return fits and {plain(part) for part in parts} == expected
    if kind == "d":
        return isinstance(expected, dict) and _same_dict(parts, expected, as_json)
    if kind in ("i", "c", "b"):
        return _same_scalar(plain(value), expected, as_json)
    return False


def _same_scalar(value: Any, expected: Any, as_json: bool) -> bool:
    if not as_json:
        return bool(value == expected)
    if isinstance(value, bool) or isinstance(expected, bool) or value is None or expected is None:
        return value is expected
    if isinstance(value, float) or isinstance(expected, float):
        numbers = isinstance(value, int | float) and isinstance(expected, int | float)
        return numbers and (value == expected or math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12))
    return type(value) is type(expected) and value == expected


def _same_dict(parts: list[Any], expected: dict[Any, Any], as_json: bool) -> bool:
    if len(parts) != 2 * len(expected):
        return False
    met = set()
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        key = plain(key)
        if as_json and not isinstance(key, str):
            key = json.dumps(key)  # as JSON writes the keys 1, 1.5, true and null
        if key not in expected or not same(value, expected[key], as_json):
            return False
        met.add(key)
    return len(met) == len(expected)


def plain(value: Any) -> Any:
    """A scalar, a tuple or a frozen set of such, as Python has it. Raises ValueError for anything else."""
    if not isinstance(value, list):
        return value
    kind, *parts = value
    if kind == "i":
        return int(parts[0], 16)
    if kind == "c":
        return complex(*map(plain, parts))
    if kind == "b":
        return bytes.fromhex(parts[0])
    if kind in ("t", "s"):
        return (tuple if kind == "t" else frozenset)(map(plain, parts))
    raise ValueError(f"no plain value: {kind!r}")
