# SPDX-License-Identifier: Apache-2.0
"""The one exception for input the user can mend."""

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
