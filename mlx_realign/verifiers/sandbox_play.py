# SPDX-License-Identifier: Apache-2.0
"""What runs in a test's own process: the program, what the test asks of it, and the value's way out as JSON."""

import os
import sys
from typing import Any

try:
    from _json import encode_basestring_ascii as quote  # the C half of json, without the cost of the rest
except ImportError:
    from json.encoder import py_encode_basestring_ascii as quote

STATUSES = ("ok", "raised", "timeout", "memory", "output", "died", "syntax", "unconfined")
OK, RAISED, TIMEOUT, MEMORY, OUTPUT, DIED, SYNTAX, UNCONFINED = range(8)
RESULT = 3  # the descriptor where a value goes
DEEPEST, PARTS = 60, 200_000  # of a result


def play(code: str, mode: str, text: str) -> int:
    """Run the program and the test in it: the exit code. What the program does to this code spoils its answer alone."""
    name = "__main__" if mode == "stdin" else "solution"
    module = type(sys)(name)
    sys.modules[name] = module
    sys.argv = ["solution.py"]
    sys.stdin = sys.__stdin__ = open(0, encoding="utf-8", closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", errors="replace", closefd=False)
    try:
        program = compile(code, "solution.py", "exec", dont_inherit=True)
    except MemoryError:
        return MEMORY
    except (SyntaxError, ValueError, RecursionError, OverflowError):
        return SYNTAX
    try:
        return play_compiled(program, module.__dict__, mode, text)
    except MemoryError:
        return MEMORY
    except BaseException:
        return RAISED


def play_compiled(program: Any, names: dict[str, Any], mode: str, text: str) -> int:
    """Run it, then what the mode asks for. Ending early is an end for a script and no answer to a call."""
    try:
        exec(program, names)
        if mode == "call":
            write(RESULT, encode(eval(compile(text, "test", "eval", dont_inherit=True), names), [PARTS]).encode())
        elif mode == "assert":
            exec(compile(text, "test", "exec", dont_inherit=True), names)
            write(RESULT, b"true")
        else:
            end_of_script()
    except SystemExit as stop:
        if mode != "stdin" or stop.code not in (None, 0):
            return RAISED
        end_of_script()
    return OK


def end_of_script() -> None:
    """What an interpreter does at its end: wait for threads, run what was registered, write what is buffered."""
    import atexit

    threads = sys.modules.get("threading")
    if threads:
        threads._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()


def write(file: int, data: bytes) -> None:
    """All of it."""
    while data:
        data = data[os.write(file, data) :]


def encode(value: Any, left: list[int], depth: int = 0) -> str:
    """A value of builtin types as JSON: null, true, numbers, strings; the rest as lists that begin with a letter.

    l list, t tuple, s set, d dict (key, value, key ...), i integer of over 63 bits in hexadecimal, c complex, b bytes,
    o anything else, which equals nothing. Raises OverflowError when it has more parts than `left` counts down.
    """
    left[0] -= 1
    if left[0] < 0:
        raise OverflowError("the value has too many parts")
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return quote(str(value))
    if isinstance(value, int):
        return str(int(value)) if -(2**63) <= value < 2**63 else f'["i","{int(value):x}"]'
    if isinstance(value, float):
        text = float.__repr__(value)
        return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(text, text)
    if isinstance(value, complex):
        return f'["c",{encode(value.real, left)},{encode(value.imag, left)}]'
    if isinstance(value, bytes | bytearray):
        return f'["b","{value.hex()}"]'
    letters = [(list, "l"), (tuple, "t"), (set, "s"), (frozenset, "s"), (dict, "d")]
    letter = next((letter for kind, letter in letters if isinstance(value, kind)), None)
    if letter is None or depth >= DEEPEST:
        return '["o"]'
    parts = [part for pair in value.items() for part in pair] if letter == "d" else value
    return f'["{letter}"' + "".join("," + encode(part, left, depth + 1) for part in parts) + "]"
