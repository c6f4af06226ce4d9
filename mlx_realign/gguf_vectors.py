# SPDX-License-Identifier: Apache-2.0
"""Control vectors of llama.cpp: GGUF files whose `direction.<k>` is added to the output of block k, at every token.

Block k of such a file is our block k: no shift. Block 0 cannot be said there, and neither can an operator other than
adding, positions, or which model it is; llama.cpp ignores metadata and checks only the width. So a direction that is
meant for something else is refused. Our own header goes along under a key of its own and is read back.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import gguf, vectors
from .errors import UserError
from .vectors import VECTOR, About, Direction

ARCHITECTURE = "controlvector"  # what llama.cpp's own tool and repeng write
FIRST = 1  # block


def write(
    direction: Direction,
    path: str | Path,
    *,
    model_type: str,
    coefficient: float | None = None,
    blocks: Sequence[int] | None = None,
    force: bool = False,
) -> list[int]:
    """Write a .gguf for `llama-cli --control-vector FILE`; returns the blocks that are in it.

    model_type: of the model's config, as a hint. coefficient: what strength 1 will mean there, in the direction's own
    strength unit; default: the calibrated one, or 1. blocks: default those it is meant for, or all from block 1 on;
    llama.cpp adds all that are in the file. Tensors are float32 [d]. UserError for blocks that GGUF cannot name and,
    unless `force`, for a direction that is not meant to be added at all positions.
    """
    path, about = Path(path), direction.about
    if path.suffix != ".gguf":
        raise UserError(f"{path}: a control vector is kept in a file that ends in .gguf")
    if not force and (about.operator, about.positions) != ("add", "all"):
        raise UserError(
            f"{path}: a control vector of llama.cpp is added at all positions, and this direction is meant for "
            f"operator {about.operator}, positions {about.positions}. To write it all the same: --force (force=True)."
        )
    chosen = _chosen(direction, path, blocks)
    scaled = _scaled(direction, chosen, coefficient)
    tensors = {f"{VECTOR}{block}": mx.array(vector) for block, vector in scaled.vectors.items()}
    facts: dict[str, Any] = {
        "general.architecture": ARCHITECTURE,
        f"{ARCHITECTURE}.model_hint": model_type,
        f"{ARCHITECTURE}.layer_count": mx.array(len(chosen), mx.uint32),
        vectors.HEADER: vectors.header(scaled),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.{os.getpid()}.gguf")  # mx.save_gguf insists on the ending
    mx.save_gguf(str(part), tensors, facts)
    os.replace(part, path)
    return chosen


def read(path: str | Path) -> Direction:
    """A control vector as a direction to add with coefficient 1; of one written here, all that its header said.

    UserError for a file that is none. What llama.cpp would refuse is refused: block 0, tensors that are not [d].
    """
    path = Path(path)
    try:
        facts, arrays = gguf.read(path, VECTOR)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a complete GGUF file ({error}). Copy it again.") from None
    tensors = {name: array.astype(np.float32) for name, array in arrays.items()}
    if not tensors:
        kind = facts.get("general.architecture", "no architecture")
        raise UserError(f"{path}: holds no tensor {VECTOR}<block>, so it is no control vector (it is: {kind}).")
    for name, tensor in tensors.items():
        block = name.removeprefix(VECTOR)
        if not re.fullmatch("[0-9]{1,6}", block) or int(block) < FIRST or tensor.ndim != 1:
            raise UserError(f"{path}: {name} {list(tensor.shape)} is not a vector of a block from {FIRST} on.")
    if isinstance(text := facts.get(vectors.HEADER), str):
        return vectors.assemble(path, text, tensors)
    hint = str(facts.get(f"{ARCHITECTURE}.model_hint", ""))  # an architecture, no model
    measured = {"model_hint": hint} if hint else {}
    about = About(method="unknown", position="unknown", coefficient=1.0, measured=measured)
    try:
        return Direction(vectors.by_block(tensors, VECTOR), about)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _chosen(direction: Direction, path: Path, blocks: Sequence[int] | None) -> list[int]:
    """Blocks to write, in order; UserError where GGUF cannot say them or the direction has none of them."""
    wanted = sorted(blocks or direction.about.blocks) or [b for b in direction.blocks if b >= FIRST]
    unsaid = [block for block in wanted if block < FIRST]
    if unsaid or not wanted:
        what = f"block {unsaid[0]}" if unsaid else f"any of the blocks {vectors.spans(direction.blocks)}"
        raise UserError(f"{path}: GGUF control vectors begin with block {FIRST} and cannot say {what}: choose others.")
    if missing := [block for block in wanted if block not in direction.vectors]:
        raise UserError(f"the direction has no block {missing[0]}; it has {vectors.spans(direction.blocks)}.")
    return wanted


def _scaled(direction: Direction, blocks: list[int], coefficient: float | None) -> Direction:
    """Of these blocks alone, with the coefficient multiplied in."""
    about = direction.about
    factor = next(x for x in (coefficient, about.coefficient, 1.0) if x is not None)
    if about.strength_unit == "residual":
        found = {block: factor * direction.vectors[block] for block in blocks}
    elif lacking := [block for block in blocks if block not in direction.median_norm]:
        raise UserError(f"its strength is a share of median_norm, which block {lacking[0]} lacks: extract it again.")
    else:
        found = {block: factor * direction.median_norm[block] * direction.unit(block) for block in blocks}
    norms = {block: norm for block, norm in direction.median_norm.items() if block in blocks}
    said = {"coefficient": 1.0, "strength_unit": "residual", "blocks": tuple(blocks)}
    return Direction(found, dataclasses.replace(about, **said), {}, norms)
