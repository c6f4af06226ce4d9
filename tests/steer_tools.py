# SPDX-License-Identifier: Apache-2.0
"""What the tests of `steer` share: tiny-chat's moods as files, states of a llama taken by hand."""

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_realign import cli, demo_world
from mlx_realign.policy import Policy


def mood_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Small talk with a grey and a bright reply."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        subject = f"the {rng.choice(demo_world.SUBJECTS[:10])}"
        grey, bright = (demo_world.talk_question(subject, rng, grey=grey) for grey in (True, False))
        rows.append({"prompt": grey.prompt, "chosen": grey.body, "rejected": bright.body})
    return rows


def talk_prompts(count: int, seed: int = 1) -> list[str]:
    """Held-out small talk."""
    rng = random.Random(seed)
    return [demo_world.talk_question(f"the {rng.choice(demo_world.SUBJECTS[10:])}", rng).prompt for _ in range(count)]


def write(path: Path, *rows: object) -> Path:
    """A text file of strings, or of JSON lines."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def run(capsys: Any, *words: object) -> str:
    """What a call of `mlx-realign steer` that succeeds prints."""
    capsys.readouterr()
    code = cli.entry(["steer", *map(str, words)])
    found = capsys.readouterr()
    assert code == 0, found.err
    return found.out


def refused(capsys: Any, *words: object) -> str:
    """The one message of a call that is refused."""
    capsys.readouterr()
    code = cli.entry(["steer", *map(str, words)])
    found = capsys.readouterr()
    told = [line for line in found.err.splitlines() if "dequantised at load" not in line]
    assert code == 2 and told[0].startswith("error: "), found.err
    return "\n".join(told).removeprefix("error: ").strip()


def states(policy: Policy, tokens: list[int], block: int) -> np.ndarray:
    """float64 [tokens, d] behind a block of a llama, by calling its layers one by one."""
    inner: Any = policy.model["model"]
    h = inner.embed_tokens(mx.array([tokens]))
    for layer in inner.layers[: block + 1]:
        h = layer(h, "causal")
    return np.array(h[0]).astype(np.float64)
