# SPDX-License-Identifier: Apache-2.0
"""The one exception for input the user can mend, and other errors on one line."""

from textwrap import shorten

LONGEST = 1000  # characters of a line of a message; what it quotes may have millions
TAIL = 300  # of them from its end, where a message says what to do


def shortened(text: str, longest: int = LONGEST) -> str:
    """The text with the middle of each line that is longer left out, and how much that was."""
    if len(text) <= longest:
        return text
    lines = []
    for line in text.split("\n"):
        if len(line) > longest:
            tail = min(TAIL, longest // 2)
            line = f"{line[: longest - tail]} [... {len(line) - longest} more ...] {line[-tail:]}"
        lines.append(line)
    return "\n".join(lines)


class UserError(Exception):
    """Flags, config, data or model are wrong. The message says file, line or field, what was expected, what to do.

    The command line prints it as one message without a traceback and exits with code 2. Long lines lose their middle.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(shortened(str(message)))


def clipped(text: object, most: int) -> str:
    """The text on one line of at most `most` characters; what is left out ends at a word, and is shown by dots."""
    return shorten(str(text), most, placeholder=" ...")


def said(error: Exception) -> str:
    """An error's kind and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {clipped(lines[0], 160)}" if lines else type(error).__name__
