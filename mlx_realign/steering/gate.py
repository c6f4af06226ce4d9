# SPDX-License-Identifier: Apache-2.0
"""Which prompts are steered at all: a condition, from prompts to steer and prompts to leave alone. arXiv:2409.05907.

    mlx-realign steer condition --model tiny-chat --positive steer.txt --negative leave.txt --output gate.safetensors
    mlx-realign steer generate --steer mood.safetensors --condition gate.safetensors --prompt "How is the garden?"

Sets as for `steer extract`. Every other prompt gives the direction, the difference of the means at the last prompt
token; the rest give the threshold of the best F1 at each block, and the first block that is as good as any. A prompt on
the wrong side of the threshold is answered by the model without steering, bit for bit. Blocks below the condition's are
steered one token later.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table

from .. import capture, vectors
from ..directions import alike, mean_difference
from ..errors import UserError
from ..policy import Policy
from ..terminal import Console
from ..vectors import About, Direction
from . import pairs
from .asked import ModelFlags, blocks_of, load_model
from .condition import KEPT, Condition, Fit, fit
from .pairs import Contrast

LEAST = 4  # prompts of a set: two for the direction and two for the threshold
SLACK = 0.02  # F1 that an earlier block may lack: what comes before the condition's block is steered a token late
SHOWN = 5  # blocks in the table
CLEAR = 0.9  # F1 below which a condition is not to be relied on


@dataclass(frozen=True, kw_only=True)
class Settings(ModelFlags):
    """What `steer condition` can be told."""

    positive: str
    """Prompts to steer: a file; or one file with both sets."""
    output: str
    """File to write, ending in .safetensors."""
    negative: str | None = None
    """Prompts to leave alone: a file."""
    positive_label: str | None = None
    """Which of the two labels of a file is that of prompts to steer."""
    block: str = "all"
    """Blocks to choose among, 12 or 0-12 say: none above those that are steered, or these are steered a token late."""
    json: bool = False
    """Print one JSON object instead of the table."""


def command(settings: Settings) -> int:
    """`mlx-realign steer condition`; returns 0."""
    path = Path(settings.output)
    if path.suffix != ".safetensors":
        raise UserError(f"--output {path}: must end in .safetensors.")
    if path.exists():
        raise UserError(f"--output {path}: exists already. Give a new file.")
    contrast = pairs.read(settings.positive, settings.negative, positive_label=settings.positive_label)
    with Console(stderr=True).status(f"loading {settings.model}") as status:
        policy = load_model(settings)
        status.update(f"states of {len(contrast.positive) + len(contrast.negative)} prompts")
        found = fitted(policy, contrast, settings.block)
    save(found, path, policy, contrast.hash)
    if settings.json:
        rows = [point._asdict() for point in found.table]
        told = {"output": settings.output, "block": found.condition.block, "blocks": rows, "notes": contrast.notes}
        print(json.dumps(told))
        return 0
    console = Console()
    console.print(table(found))
    for line in [*contrast.notes, *remarks(found, settings.output)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def fitted(policy: Policy, contrast: Contrast, blocks: str = "all") -> Fit:
    """The condition of two sets of prompts, and all that was tried. UserError for sets too small, or alike."""
    sides = []
    for name in ("positive", "negative"):
        prompts = getattr(contrast, name)
        if len(prompts) < LEAST:
            raise UserError(f"a condition needs at least {LEAST} prompts of each kind; {len(prompts)} are {name}.")
        sides.append(capture.collect(policy, capture.encode(policy, prompts))[:, :, 0].astype(np.float64))
    positive, negative = ([side[half::2] for half in (0, 1)] for side in sides)
    behind = negative[0].mean(0)
    every = list(range(-1, sides[0].shape[1] - 1))
    halves = {b: (positive[0][:, i], negative[0][:, i]) for i, b in enumerate(every)}
    rows = {block: mean_difference(*both) for block, both in halves.items() if not alike(*both)}
    if not rows:
        raise UserError("both sets give the same states in every block: the prompts do not differ where they are read.")
    direction = Direction(rows, baseline={b: behind[i] for i, b in enumerate(every) if b in rows})
    allowed = blocks_of(blocks, direction, flag="--block")
    kept = Direction({b: direction.vectors[b] for b in allowed}, baseline={b: direction.baseline[b] for b in allowed})
    found = fit(positive[1], negative[1], kept, every)
    most = max(point.f1 for point in found.table)
    early = min((point for point in found.table if point.f1 >= most - SLACK), key=lambda point: point.block)
    return Fit(Condition(kept, early.block, early.threshold, early.sense), found.table)


def save(found: Fit, path: Path, policy: Policy, data_hash: str = "") -> None:
    """A file that `condition.load` reads: the direction of the condition's block, the condition in its header."""
    condition = found.condition
    block, direction = condition.block, condition.direction
    best = next(point for point in found.table if point.block == block)
    told = {name: getattr(condition, name) for name in KEPT}
    about = About(
        operator="condition",
        positions="last",
        blocks=(block,),
        base_model=policy.name,
        base_hash=policy.base_hash,
        data_hash=data_hash,
        measured={"condition": {"block": block, **told}, "f1": best.f1, "auroc": best.auroc},
    )
    vectors.save(Direction({block: direction.vectors[block]}, about, {block: direction.baseline[block]}), path)


def table(found: Fit) -> Table:
    """The blocks that tell the sets best, the chosen one marked."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("block", "threshold", "opens", "F1", "AUROC"):
        shown.add_column(name, justify="left" if name == "opens" else "right")
    ranked = sorted(found.table, key=lambda point: (-point.f1, -point.auroc, point.block))
    for one in ranked[:SHOWN]:
        mark = "*" if one.block == found.condition.block else " "
        cells = (f"{mark} {one.block}", f"{one.threshold:.3g}", one.sense, f"{one.f1:.2f}", f"{one.auroc:.3f}")
        shown.add_row(*cells)
    return shown


def remarks(found: Fit, output: str) -> list[str]:
    """What is to be known beside the table."""
    best = next(point for point in found.table if point.block == found.condition.block)
    lines = [
        f"steers prompts {best.sense} {best.threshold:.3g} at block {best.block}; the threshold is from other prompts "
        "than the direction"
    ]
    if best.f1 < CLEAR:
        lines.append(f"warning: F1 is only {best.f1:.2f}: these sets differ little at their last token")
    use = f"mlx-realign steer generate --steer DIRECTION --condition {output}"
    return [*lines, f"written to {output}; use it: {use}"]
