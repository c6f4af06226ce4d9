# SPDX-License-Identifier: Apache-2.0
"""What a process says never stops what it does: standard output and error without a reader swallow what is written.

`train | head -1` closes the pipe after a line, a terminal may go away, the disk behind `> log` may be full. Work whose
result is a file goes on; a command whose output is all there is says `ends_with_reader`.
"""

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

NAME = "standard output"
NOBODY = (errno.EPIPE, errno.EIO)  # the reader has gone, the terminal has gone: nothing was lost that anyone reads


class Lasting:
    """A text stream whose first failed write is remembered as `lost`; all that comes after it goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.lost: OSError | None = None
        self.raises = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text [characters]; returns how many were taken, which is all of them."""
        if not self.lost:
            try:
                return self.stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: closed by somebody
                self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand over what was written."""
        if not self.lost:
            try:
                self.stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: OSError | ValueError) -> None:
        if isinstance(error, UnicodeError):
            raise error
        self.lost = error if isinstance(error, OSError) else BrokenPipeError(errno.EPIPE, str(error))
        try:  # the interpreter flushes once more at its end
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError):
            pass
        if self.raises:
            raise self.lost


def lasting(stream: TextIO | None) -> TextIO:
    """The stream as one that never fails; itself if it is one, and one that goes nowhere for a closed one."""
    if isinstance(stream, Lasting):
        return cast(TextIO, stream)
    return cast(TextIO, Lasting(stream or open(os.devnull, "w", encoding="utf-8")))  # noqa: SIM115


@contextmanager
def surviving() -> Iterator[None]:
    """Inside, sys.stdout and sys.stderr never fail. At the end OSError where what was lost has a reader."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (lasting(stream) for stream in before)
    now = sys.stdout, sys.stderr
    try:
        yield
        now[0].flush()
        lost = getattr(now[0], "lost", None)
        if lost is not None and lost.errno not in NOBODY:
            raise OSError(lost.errno, lost.strerror, NAME)
    finally:
        sys.stdout, sys.stderr = before
        for stream, own in zip(before, now, strict=True):
            if stream is None:
                own.close()


def ends_with_reader() -> None:
    """Say that what is printed from here on is all there is: without a reader BrokenPipeError ends the command."""
    if isinstance(sys.stdout, Lasting):
        sys.stdout.raises = True
