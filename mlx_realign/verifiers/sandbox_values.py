# SPDX-License-Identifier: Apache-2.0
"""The form in which a value leaves the sandbox: JSON that says of each part which builtin type it was."""

from typing import Any

try:
    from _json import encode_basestring_ascii as quote  # the C half of json, without the cost of the rest
except ImportError:
    from json.encoder import py_encode_basestring_ascii as quote

DEEPEST, PARTS = 60, 200_000  # of a result


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
