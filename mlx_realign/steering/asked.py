# SPDX-License-Identifier: Apache-2.0
"""What the commands of `steer` are told alike: how to load the model, and which directions to steer along.

`--steer FILE` or `--steer FILE:coefficient`; several with commas between them, or the flag again. Without a coefficient
it is the one that the file was calibrated to, or 1.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .. import vectors
from ..errors import UserError
from ..policy import Policy
from ..vectors import Direction
from . import condition, schedule
from .spec import Steer

Operator = Literal["add", "add_norm", "ablate", "ablate_add", "clamp", "affine", "angular"]


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    """How the model is loaded."""

    model: str
    """Model folder, hub id, or `tiny-chat` (embedded)."""
    adapter: str | None = None
    """Adapter folder (mlx-lm or PEFT) to apply."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute dtype; auto is float32 on CPU, else the model's own."""
    quantize: Literal[4, 8] | None = None
    """Quantise the weights at load."""
    cpu_dequantize: Literal["auto", "never"] = "auto"
    """On CPU, quantised weights are dequantised to float32 at load, which is 30 times faster there."""
    trust_remote_code: bool = False
    """Let code in the model folder run."""


@dataclass(frozen=True, kw_only=True)
class UseFlags(ModelFlags):
    """How a model is loaded for a direction that was made on it."""

    model: str = ""
    """Model folder, hub id, or `tiny-chat` (embedded); default: the one the direction was made on."""
    force: bool = False
    """Use a direction on other weights than those it was made on (of the same width and number of blocks)."""


@dataclass(frozen=True, kw_only=True)
class SteerFlags:
    """Which directions, and how."""

    steer: tuple[str, ...] = ()
    """Directions to steer along: FILE or FILE:coefficient, comma-separated or the flag again."""
    operator: Operator | None = None
    """What is done along the direction; default: the file's."""
    positions: str | None = None
    """Tokens that are steered: all, prompt, generated, last (of the prompt) or start:stop; default: the file's."""
    blocks: str | None = None
    """Blocks that are steered: 12, 8-14, 3,5,7-9 or all; default: the file's."""
    strength_unit: Literal["residual", "median_norm"] | None = None
    """A coefficient of 1 is the vector as it is, or the median length of the block's states; default: the file's."""
    schedule: str | None = None
    """How the coefficient changes over generated tokens: linear:TOKENS or decay:TOKENS; default: it does not."""
    low: float | None = None
    """clamp: least projection, in units of the residual stream."""
    high: float | None = None
    """clamp: largest projection."""
    angle: float | None = None
    """angular: degrees."""
    condition: str | None = None
    """Steer only the prompts that this file of `steer condition` lets through."""


def load_model(settings: ModelFlags, *files: str) -> Policy:
    """The policy, with what was done to it said on standard error; files: directions that may name the model."""
    name = settings.model
    if not name:
        known = [vectors.load(split(file)[0]).about.base_model for file in files]
        name = next(filter(None, known), "")
    if not name:
        raise UserError("--model is needed: the direction does not say which model it was made on.")
    options = {key: getattr(settings, key) for key in ("dtype", "quantize", "cpu_dequantize", "trust_remote_code")}
    policy = Policy.load(name, adapter=settings.adapter, **options)
    for note in policy.notes:
        print(note, file=sys.stderr)
    return policy


def joined(argv: Sequence[str], flag: str = "--steer") -> list[str]:
    """The words with a repeated flag's values in one, comma-separated: of other flags the last one wins."""
    words, values = [], []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word.startswith(flag + "="):
            values.append(word.partition("=")[2])
        elif word == flag and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        else:
            words.append(word)
    return [*words, flag, ",".join(values)] if values else words


def split(text: str) -> tuple[str, float | None]:
    """File and coefficient of FILE[:coefficient]."""
    file, colon, number = text.rpartition(":")
    try:
        return (file, float(number)) if colon and file else (text, None)
    except ValueError:
        return text, None


def steers_of(settings: SteerFlags, policy: Policy, *, force: bool | None = False) -> list[Steer]:
    """One Steer per --steer, its file checked against the model (vectors.load says what `force` lets pass).

    UserError for a file that cannot be used, a coefficient that is no finite number, blocks that it does not have.
    """
    found = []
    for text in settings.steer:
        file, coefficient = split(text)
        if coefficient is not None and not abs(coefficient) < float("inf"):
            raise UserError(f"--steer {text}: the coefficient must be a finite number.")
        direction = vectors.load(file, policy=policy, force=force)
        one = steer_of(direction, settings, coefficient, file)
        if settings.condition is not None:
            one = Steer.of(one, condition=condition.load(settings.condition, policy, force=force))
        found.append(one)
    return found


def steer_of(direction: Direction, settings: SteerFlags, coefficient: float | None = None, file: str = "") -> Steer:
    """The file's own way to be used, where the flags do not say another one."""
    asked = {"operator": settings.operator, "positions": settings.positions, "unit": settings.strength_unit}
    asked |= {name: getattr(settings, name) for name in ("low", "high", "angle")} | {"coefficient": coefficient}
    chosen = {name: value for name, value in asked.items() if value is not None}
    if settings.blocks is not None:
        chosen["blocks"] = blocks_of(settings.blocks, direction, file)
    if settings.schedule is not None:
        chosen["schedule"] = schedule.read(settings.schedule)
    return Steer.of(direction, **chosen)


def blocks_of(text: str, direction: Direction, file: str = "", flag: str = "--blocks") -> tuple[int, ...]:
    """Blocks of `12`, `8-14`, `3,5,7-9` or `all`. UserError where it is none of them or has no vector in the file."""
    if text == "all":
        return tuple(direction.blocks)
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise UserError(f"{flag} {text}: expected blocks such as 12, 8-14, 3,5,7-9, or all.")
        found |= set(range(first, last + 1))
    if missing := sorted(found - set(direction.blocks)):
        there = vectors.spans(direction.blocks)
        raise UserError(f"{flag} {text}: {file or 'the direction'} has no block {missing[0]}; it has {there}.")
    return tuple(sorted(found))
