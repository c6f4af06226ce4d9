# SPDX-License-Identifier: Apache-2.0
"""How a command is told from outside to end: Ctrl-C (SIGINT), SIGTERM, and SIGHUP when its terminal goes away.

All three do the same: what is under way is brought to a good end or undone, and the exit code is 128 and the signal's
number. SIGHUP stays ignored where it is (`nohup`).
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(KeyboardInterrupt):
    """A signal asked for the end; `number` is the signal's. Ctrl-C's own KeyboardInterrupt has none."""

    def __init__(self, text: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.number = number


def code(stop: BaseException) -> int:
    """The exit code of a command that was ended by this: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + getattr(stop, "number", signal.SIGINT)


@contextmanager
def raised() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise Ended wherever the program is, as Ctrl-C raises KeyboardInterrupt."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Ended(f"ended by {signal.Signals(number).name}", number)

    with _handling(end, SIGNALS[1:]):
        yield


@contextmanager
def noted(text: str) -> Iterator[Callable[[], int | None]]:
    """Inside, the first signal only leaves a mark and says `text` on standard error; the second one ends at once.

    The yielded function tells the number of the signal that came, or None.
    """
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise Ended(f"ended by {signal.Signals(number).name}", number)
        asked.append(number)
        try:  # not through a buffered stream: the signal may have come in the middle of a write to it
            os.write(2, f"\n{text}\n".encode())
        except OSError:  # the terminal may be gone, which is why SIGHUP came
            pass

    with _handling(note, SIGNALS):
        yield lambda: asked[0] if asked else None


@contextmanager
def _handling(handler: Handler, numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    before = {}
    try:
        for number in numbers:
            now = signal.getsignal(number)  # None: one of C, which could not be put back
            if now is not None and not (number == signal.SIGHUP and now == signal.SIG_IGN):
                before[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread: the caller's own business
        pass
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
