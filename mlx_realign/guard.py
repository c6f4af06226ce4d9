# SPDX-License-Identifier: Apache-2.0
"""What ends a run early: numbers that make no sense, a first step that teaches nothing, Ctrl-C."""

import math
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx

from . import ends, fingerprint
from .optim import flat

EXPLODED = 1000.0  # a gradient norm so many times the usual one stops the run
REMEMBERED, ENOUGH = 100, 10  # norms of the last steps; fewer than this many say nothing about what is usual
STILL = 10
LINES_SHOWN = 40
OUT_OF_MEMORY = ("malloc", "out of memory", "insufficient memory", "unable to allocate")


class Fault(Exception):
    """Training cannot go on; the message says why, and the last good checkpoint stays."""


class Interrupted(Exception):
    """Stopped by the user after a checkpoint was saved; `number` is the signal's that asked for it."""

    def __init__(self, text: str, number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.number = number


class Norms:
    """Gradient norms of the last steps, and what to make of the next one."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.last: list[float] = []
        self.still = 0  # steps in a row without a gradient, although there is a loss

    @property
    def usual(self) -> float:
        """The median of the last steps, or of the first ones if that is larger.

        A policy that knows its rows by heart has tiny gradients until a new row comes, which is no explosion.
        """
        return max(map(statistics.median, (self.first, self.last))) if len(self.first) == ENOUGH else math.inf

    def refuse(self, step: int, loss: float, norm: float, lines: Sequence[tuple[Sequence[int], mx.array]]) -> None:
        """Raises Fault for a loss or norm that is not finite, or a norm far above the usual; else remembers the norm.

        lines: of each micro-batch the line numbers of its rows, and its summed loss.
        """
        bad = [f"{name} is {x}" for name, x in (("loss", loss), ("grad_norm", norm)) if not math.isfinite(x)]
        if not bad and norm > EXPLODED * self.usual:
            bad = [f"grad_norm is {norm:.4g}, {norm / self.usual:.0f} times the usual {self.usual:.4g}"]
        if bad:
            guilty = [own for own, total in lines if not mx.isfinite(total).item()] or [own for own, _ in lines]
            rows = listed([line for own in guilty for line in own])
            raise Fault(f"step {step}: {bad[0]}; rows at lines {rows}. Look at these rows, or lower --learning-rate")
        self.still = 0 if norm or not loss else self.still + 1
        if self.still == STILL:
            raise Fault(
                f"step {step}: the gradient has been zero for {STILL} steps, although the loss is {loss:.4g}: the "
                "policy has left the range in which it can learn. Lower --learning-rate"
            )
        if not norm:  # a group whose rewards are all the same: no step to measure others by
            return
        self.first = [*self.first, norm][:ENOUGH]
        self.last = [*self.last[1 - REMEMBERED :], norm]


def refuse_broken_weights(step: int, weights: dict[str, Any]) -> None:
    """Raises Fault where a weight is not finite: such a state must not become the newest checkpoint."""
    arrays = flat(weights)
    finite: Any = mx.stack([mx.isfinite(value).all() for value in arrays.values()]).tolist()
    broken = [name for name, good in zip(arrays, finite, strict=True) if not good]
    if broken:
        told = f"{len(broken)} trained tensors hold NaN or infinity, {broken[0]} among them"
        raise Fault(f"step {step}: {told}. Lower --learning-rate")


def contents(weights: dict[str, Any]) -> dict[str, str]:
    """Path -> hash of each tensor of a tree."""
    return {path: fingerprint.of([(path, value)]) for path, value in flat(weights).items()}


def prove_learning(before: dict[str, str], weights: dict[str, Any], norm: float, rate: float) -> int:
    """Number of trained tensors that the first optimizer step moved. Raises Fault where it can teach nothing.

    before: `contents` of the trained weights before the step, whose gradient had this norm.
    """
    if norm == 0:
        raise Fault(
            "step 1: the gradient is zero, so nothing would be learned. Are the completions of a row alike, "
            "or is every token masked? mlx-realign data show FILE shows what is trained"
        )
    moved = sum(before[path] != now for path, now in contents(weights).items())
    if not moved:
        raise Fault(
            f"step 1: no trained weight moved, although the gradient's norm is {norm:.4g}: a step of {rate:.2g} is "
            "lost in rounding. Raise --learning-rate, or train in --dtype float32"
        )
    return moved


@contextmanager
def enough_memory(step: int) -> Iterator[None]:
    """Inside, a failed allocation of a GPU becomes a Fault; a CPU's, if it fails, ends the process."""
    try:
        yield
    except RuntimeError as error:
        if not any(sign in str(error).lower() for sign in OUT_OF_MEMORY):
            raise
        raise Fault(
            f"step {step}: out of memory ({str(error).splitlines()[0]}). Lower --batch-size, --batch-tokens or "
            "--max-length, or add --grad-checkpoint"
        ) from error


def interruptible() -> AbstractContextManager[Callable[[], int | None]]:
    """Inside, the first Ctrl-C, SIGTERM or SIGHUP only leaves a mark, which the yielded function tells (ends.noted)."""
    return ends.noted("stopping after this step, with a checkpoint; once more stops at once without")


def listed(lines: Sequence[int]) -> str:
    """Line numbers for a message: in order, each once, not too many."""
    found = sorted(set(lines))
    shown = ", ".join(map(str, found[:LINES_SHOWN]))
    return f"{shown} and {len(found) - LINES_SHOWN} more" if len(found) > LINES_SHOWN else shown
