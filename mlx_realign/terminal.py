# SPDX-License-Identifier: Apache-2.0
"""What a terminal is shown. Texts of rows, models, file names and configs may hold sequences that move the cursor,
change titles, hide lines or turn the direction of writing; a terminal is shown their names instead.

Files, pipes and JSON get a text as it is.
"""

import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import IO, Any, TextIO

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 but tab and newline, DEL, C1; marks and overrides of direction, invisible operators and tags; halves of characters.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_BAR = re.compile(r"\r[^\x00-\x1f\x7f-\x9f]*|(?:\x1b\[A)+")  # what a download's progress bar writes


def visible(text: str) -> str:
    """The text with characters that act on a terminal written as escapes: ESC is \\x1b, U+202E is \\u202e."""
    return _HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class Console(rich.console.Console):
    """rich's console; on a terminal only its own styles act, whatever the texts hold."""

    @property
    def file(self) -> IO[str]:
        """Where rich writes: below all streams that stand in for another one."""
        found: Any = super().file
        while hasattr(found, "rich_proxied_file"):
            found = found.rich_proxied_file
        return found

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of `renderable`, their texts made visible on a terminal."""
        segments = super().render(renderable, options)
        if not self.is_terminal:
            return segments
        return (part if part.control else part._replace(text=visible(part.text)) for part in segments)


class Shown:
    """A stream to a terminal whose texts are made visible; all else is the stream's own.

    bars: progress bars of other libraries, which go back to the start of their line, are let through.
    """

    def __init__(self, stream: TextIO, *, bars: bool = False) -> None:
        self.rich_proxied_file = stream  # rich writes its own escapes there
        self.bars = bars

    def write(self, text: str) -> int:
        """Write a text, made visible; returns its length."""
        own = self.bars and _BAR.fullmatch(text)
        self.rich_proxied_file.write(text if own else visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts one after the other."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def shown() -> Iterator[None]:
    """While the block runs, standard output and standard error make texts visible where they are terminals."""
    before = sys.stdout, sys.stderr
    out: Any = sys.stdout
    if getattr(out, "errors", "") == "strict" and hasattr(out, "reconfigure"):  # standard error is so already
        out.reconfigure(errors="backslashreplace")  # what the encoding has no word for ends no run
    sys.stdout, sys.stderr = _shown(sys.stdout), _shown(sys.stderr, bars=True)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _trace
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _trace(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A fault of the program, which may quote a row too."""
    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(visible(text) if sys.stderr.isatty() else text)


def _shown(stream: Any, *, bars: bool = False) -> Any:
    if stream is None or isinstance(stream, Shown) or not stream.isatty():
        return stream
    return Shown(stream, bars=bars)
