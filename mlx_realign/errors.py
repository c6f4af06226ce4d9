# SPDX-License-Identifier: Apache-2.0
"""The one exception for input the user can mend, and other errors on one line."""

from textwrap import shorten


class UserError(Exception):
    """Flags, config, data or model are wrong. The message says file, line or field, what was expected, what to do.

    The command line prints it as one message without a traceback and exits with code 2.
    """


def clipped(text: object, most: int) -> str:
    """The text on one line of at most `most` characters; what is left out ends at a word, and is shown by dots."""
    return shorten(str(text), most, placeholder=" ...")


def said(error: Exception) -> str:
    """An error's kind and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {clipped(lines[0], 160)}" if lines else type(error).__name__
