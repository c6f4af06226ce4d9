# SPDX-License-Identifier: Apache-2.0
"""How far each token of a text lies along a direction: a trace, coloured in the terminal.

    mlx-realign steer monitor --model tiny-chat --direction mood.safetensors --prompt "How is the garden?"
    mlx-realign steer monitor --direction mood.safetensors --prompt "How is it?" --completion "Splendid." --json

0 is where the negative set's mean lies and 1 the positive set's, where the file knows them; else the units of the
residual stream. Without --completion the model answers first, greedily.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.text import Text

from .. import capture, rollout, vectors
from ..data import encode_prompt
from ..errors import UserError
from ..policy import Policy
from ..sampling import Sampling
from ..terminal import Console
from ..vectors import Direction
from .asked import UseFlags, load_model

COLD, PLAIN, WARM = (70, 110, 220), (235, 235, 235), (220, 70, 60)  # colours of 0, one half and 1


@dataclass(frozen=True, kw_only=True)
class Settings(UseFlags):
    """What `steer monitor` can be told."""

    direction: str
    """File of the direction."""
    prompt: str
    """What the model is asked."""
    completion: str | None = None
    """What it said; default: it answers now, greedily."""
    system: str | None = None
    """System message before the prompt."""
    block: int | None = None
    """Where the states are read; default: the block the direction is meant for."""
    max_new_tokens: int = 128
    """Most tokens of the answer."""
    json: bool = False
    """Print one JSON object instead of coloured text."""


class Scale(NamedTuple):
    """Where a state lies along a direction: (state . unit - zero) / one."""

    block: int
    unit: np.ndarray  # float64 [d]
    zero: float
    one: float
    normalised: bool  # 0 is the mean of the negative set and 1 that of the positive one
    place: int = -1  # from the end: the token of a prompt whose state the direction was taken from
    prefix: tuple[int, ...] = ()  # tokens put after every prompt then

    def of(self, states: np.ndarray) -> np.ndarray:
        """float64 [...] of states [..., d]."""
        return (states.astype(np.float64) @ self.unit - self.zero) / self.one

    def of_prompts(self, policy: Policy, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """float64 [n] of prompts' token ids, read where the direction was taken from."""
        asked = [[*prompt, *self.prefix] for prompt in prompts]
        return self.of(capture.collect(policy, asked, positions=(self.place,), blocks=[self.block])[:, 0, 0])


def scale_of(direction: Direction, block: int | None = None) -> Scale:
    """The scale of a direction in one block; default: see `block_of`.

    The positive set's mean lies one vector's length beyond the negative set's, whatever the method of extraction.
    """
    block = block_of(direction) if block is None else block
    unit, baseline = direction.unit(block), direction.baseline.get(block)
    about = direction.about
    where = (int(about.position) if about.position.startswith("-") else -1), about.template_prefix
    if baseline is None:
        return Scale(block, unit, 0.0, 1.0, False, *where)
    zero, one = float(baseline.astype(np.float64) @ unit), direction.norm(block) / about.scale
    return Scale(block, unit, zero, one, True, *where)


def block_of(direction: Direction) -> int:
    """The block a direction is read in: the one it acts on, or among several the best measured, else the longest.

    Longest as a share of the median length of the block's states, where the file holds it.
    """
    blocks = list(direction.about.blocks) or direction.blocks
    best = direction.about.measured.get("best_block")
    if best in blocks:
        return int(best)
    return max(blocks, key=lambda block: direction.norm(block) / direction.median_norm.get(block, 1.0))


def trace(policy: Policy, tokens: Sequence[int], scale: Scale) -> np.ndarray:
    """float64 [tokens]: where the state of each token lies."""
    every = tuple(range(-len(tokens), 0))
    return scale.of(capture.collect(policy, [list(tokens)], positions=every, blocks=[scale.block])[0, 0])


def command(settings: Settings) -> int:
    """`mlx-realign steer monitor`; returns 0."""
    for name in ("prompt", "completion"):
        if (text := getattr(settings, name)) is not None and not text.strip():
            raise UserError(f"--{name} is empty: there is nothing to look at.")
    if settings.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, got {settings.max_new_tokens}.")
    policy = load_model(settings, settings.direction)
    direction = vectors.load(settings.direction, policy=policy, force=settings.force)
    found = monitor(policy, direction, settings)
    if settings.json:
        print(json.dumps(found, ensure_ascii=False))
    else:
        show(found, Console())
    return 0


def monitor(policy: Policy, direction: Direction, settings: Settings) -> dict[str, Any]:
    """Tokens with their projections, and the means: what `steer monitor --json` prints."""
    turns = [{"role": "system", "content": settings.system}] if settings.system else []
    prompt = [*turns, {"role": "user", "content": settings.prompt}] if turns else settings.prompt
    asked = encode_prompt(prompt, policy.tokenizer)
    if settings.completion is None:
        sampling = Sampling(max_new_tokens=settings.max_new_tokens, temperature=0.0)
        said = rollout.rollout(policy, [asked], sampling)[0][0].tokens.tolist()
    else:
        said = policy.tokenizer.encode(settings.completion, add_special_tokens=False)
    scale = scale_of(direction, settings.block)
    along = trace(policy, [*asked, *said], scale)
    parts = ["prompt"] * len(asked) + ["completion"] * len(said)
    pieces = [*pieces_of(policy.tokenizer, asked), *pieces_of(policy.tokenizer, said)]
    return {
        "direction": settings.direction,
        "block": scale.block,
        "normalised": scale.normalised,
        "prompt_mean": float(along[: len(asked)].mean()),
        "last_prompt_token": float(scale.of_prompts(policy, [asked])[0]),
        "completion_mean": float(along[len(asked) :].mean()),
        "tokens": [
            {"text": text, "id": int(token), "part": part, "projection": float(value)}
            for text, token, part, value in zip(pieces, [*asked, *said], parts, along, strict=True)
        ],
    }


def pieces_of(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds to those before it; "" where a character is not complete yet."""
    pieces, done = [], ""
    for i in range(len(tokens)):
        whole = tokenizer.decode(list(tokens[: i + 1]))
        text = "" if whole.endswith("\ufffd") else whole.removeprefix(done)
        done = whole if text else done
        pieces.append(text)
    return pieces


def show(found: dict[str, Any], console: Console) -> None:
    """Coloured text, and the numbers below it."""
    values = np.array([token["projection"] for token in found["tokens"]])
    low, high = (0.0, 1.0) if found["normalised"] else (values.min(), max(values.max(), values.min() + 1e-9))
    text = Text()
    for token, value in zip(found["tokens"], (values - low) / (high - low), strict=True):
        text.append(token["text"], style=colour(float(value)))
    console.print(text)
    unit = "0 (blue) = negative mean, 1 (red) = positive mean" if found["normalised"] else UNIT
    names = {"prompt_mean": "prompt", "last_prompt_token": "where it is answered", "completion_mean": "completion"}
    means = ", ".join(f"{label} {found[name]:.2f}" for name, label in names.items())
    console.print(
        f"block {found['block']}, {unit}: {means}; from {values.min():.2f} to {values.max():.2f}", markup=False
    )


UNIT = "units of the residual stream, the lowest blue, the highest red"


def colour(value: float) -> str:
    """Style of a token: blue at 0 and below, grey in the middle, red at 1 and above."""
    share = min(max(value, 0.0), 1.0) * 2
    ends = (COLD, PLAIN) if share < 1 else (PLAIN, WARM)
    rgb = (round(a + (b - a) * (share % 1 if share < 2 else 1)) for a, b in zip(*ends, strict=True))
    return f"black on rgb({','.join(map(str, rgb))})"
