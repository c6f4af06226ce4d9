# SPDX-License-Identifier: Apache-2.0
"""The direction that steering, ablation, monitoring and screening share: one vector per block, and where it is from.

Block l is the output of the 0-based decoder block l after its last residual add, before the model's final norm; -1 is
what block 0 reads. Vectors are not normalised: their length is in units of the residual stream. A file is safetensors
with a JSON header, and is refused by a model that it was not made for.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from . import directions, untrusted
from .adapter_targets import blocks_of
from .errors import UserError

if TYPE_CHECKING:
    from .policy import Policy

HEADER = "mlx_realign.direction"  # key of the header among the metadata of a safetensors file
VERSION = 1
SITE, CONVENTION = "block_output", "0-based block, output"
VECTOR, BASELINE = "direction.", "baseline."  # names of tensors, before the block


@dataclass(frozen=True)
class About:
    """What a direction is, how it was found and how it is meant to be used."""

    method: str = "mean_difference"  # of extraction
    position: str = "-1"  # which state of a prompt was taken: from its end, or "completion" for the mean over one
    operator: str = "add"  # what it is meant for
    positions: str = "all"  # which tokens it is meant to act on
    coefficient: float | None = None  # in strength_unit; None: nobody has calibrated it
    strength_unit: Literal["residual", "median_norm"] = "residual"  # times the vector, or times the median norm
    blocks: tuple[int, ...] = ()  # where it is meant to act; (): wherever it has a vector
    base_model: str = ""
    base_hash: str = ""  # `Policy.base_hash`; "": unknown
    data_hash: str = ""
    template_prefix: tuple[int, ...] = ()  # tokens put after every prompt before its state was taken
    numbers: dict[str, float] = field(default_factory=dict)  # of the operator: angle (degrees), low, high, shift
    scale: float = 1.0  # what the vectors were multiplied by since they were extracted
    measured: dict[str, Any] = field(default_factory=dict)  # what it was found to do; plain JSON values
    site: str = SITE
    convention: str = CONVENTION
    version: int = VERSION


@dataclass(frozen=True, eq=False)
class Direction:
    """One vector per block. Directions of one model can be added, subtracted, negated and scaled, block by block.

    Arithmetic drops what was measured of the operands: coefficient and effect.
    """

    vectors: dict[int, np.ndarray]  # block -> float32 [d]
    about: About = field(default_factory=About)
    baseline: dict[int, np.ndarray] = field(default_factory=dict)  # block -> float32 [d], mean of the negatives' states
    median_norm: dict[int, float] = field(default_factory=dict)  # block -> median length of residual states

    __array_ufunc__ = None  # so that a NumPy number times a direction is a direction

    def __post_init__(self) -> None:
        if not self.vectors:
            raise ValueError("a direction needs the vector of at least one block")
        for name in ("vectors", "baseline"):
            given: Mapping[int, np.ndarray] = getattr(self, name)
            kept = {int(block): np.array(given[block], np.float32) for block in sorted(given)}
            object.__setattr__(self, name, kept)
        norms = {int(block): float(self.median_norm[block]) for block in sorted(self.median_norm)}
        object.__setattr__(self, "median_norm", norms)
        shapes = {v.shape for v in (*self.vectors.values(), *self.baseline.values())}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"the vectors of a direction must all be [d], not {sorted(shapes)}")
        for block, vector in self.vectors.items():
            if not np.isfinite(vector).all():
                raise UserError(f"the direction of block {block} is not finite: extract it again with --dtype float32.")

    @property
    def blocks(self) -> list[int]:
        """Blocks that have a vector, in order."""
        return list(self.vectors)

    @property
    def width(self) -> int:
        """d, the width of the residual stream."""
        return len(next(iter(self.vectors.values())))

    def norm(self, block: int) -> float:
        """Length of a block's vector, in units of the residual stream."""
        return float(np.linalg.norm(self._of(block).astype(np.float64)))

    def unit(self, block: int) -> np.ndarray:
        """A block's vector at length 1, float64 [d]. UserError where it is zero."""
        return directions.unit(self._of(block))

    def at(self, place: float) -> np.ndarray:
        """Unit float64 [d] between blocks: 12.25 is three parts of block 12 and one of block 13."""
        return directions.interpolate(self.vectors, place)

    def _of(self, block: int) -> np.ndarray:
        if block not in self.vectors:
            raise UserError(f"the direction has no block {block}; it has {spans(self.blocks)}.")
        return self.vectors[block]

    def __add__(self, other: "Direction") -> "Direction":
        """Sum by block; a block that only one of them has keeps its vector."""
        if not isinstance(other, Direction):
            return NotImplemented
        about = _joined(self, other)
        vectors = {block: np.zeros(self.width) for block in {*self.vectors, *other.vectors}}
        for one in (self, other):
            for block, vector in one.vectors.items():
                vectors[block] = vectors[block] + vector
        return Direction(vectors, about, {}, {**other.median_norm, **self.median_norm})

    def __radd__(self, other: int) -> "Direction":
        """So that `sum` of directions is one."""
        return self if other == 0 else NotImplemented

    def __sub__(self, other: "Direction") -> "Direction":
        return self + -other if isinstance(other, Direction) else NotImplemented

    def __mul__(self, factor: float) -> "Direction":
        if not isinstance(factor, int | float | np.number):
            return NotImplemented
        vectors = {block: vector * float(factor) for block, vector in self.vectors.items()}
        scale = self.about.scale * float(factor)
        about = dataclasses.replace(self.about, coefficient=None, scale=scale, measured={})
        return Direction(vectors, about, self.baseline, self.median_norm)

    def __rmul__(self, factor: float) -> "Direction":
        return self * factor

    def __truediv__(self, factor: float) -> "Direction":
        return self * (1 / factor)

    def __neg__(self) -> "Direction":
        return self * -1.0


def _joined(one: Direction, other: Direction) -> About:
    """About a sum; UserError where the two cannot be added."""
    a, b = one.about, other.about
    if one.width != other.width or (a.base_hash and b.base_hash and a.base_hash != b.base_hash):
        of = [f"{x.base_model or 'an unknown model'} (width {w})" for x, w in ((a, one.width), (b, other.width))]
        raise UserError(f"directions of different models cannot be added: {of[0]} and {of[1]}. Extract both on one.")
    if (a.site, a.convention) != (b.site, b.convention):
        raise UserError(f"directions of different places cannot be added: {a.site} and {b.site}.")
    return dataclasses.replace(
        a,
        method=a.method if a.method == b.method else f"{a.method} + {b.method}",
        coefficient=None,
        blocks=tuple(sorted({*a.blocks, *b.blocks})) if a.blocks and b.blocks else (),
        base_model=a.base_model or b.base_model,
        base_hash=a.base_hash or b.base_hash,
        data_hash=a.data_hash if a.data_hash == b.data_hash else f"{a.data_hash}+{b.data_hash}",
        scale=1.0,
        measured={},
    )


# ------------------------------------------------------------------ files


def save(direction: Direction, path: str | Path) -> None:
    """Write a .safetensors file: `direction.<block>` and `baseline.<block>` float32 [d], the rest in its header."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a direction is kept in a file that ends in .safetensors")
    tensors = {f"{VECTOR}{block}": vector for block, vector in direction.vectors.items()}
    tensors |= {f"{BASELINE}{block}": vector for block, vector in direction.baseline.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, part, metadata={HEADER: header(direction)})
    os.replace(part, path)


MOST = 4_000  # tensors of a file
ALIKE = ", or use --force (force=True) if you know that they are alike"


def load(path: str | Path, *, policy: "Policy | None" = None, force: bool | None = False) -> Direction:
    """Read a file of `save`, or a GGUF control vector; with `policy`, it must fit that model.

    UserError for a file that is none or is broken, for a site or a convention that this version does not know, and for
    a model of another width, with fewer blocks or (unless `force`) with other weights.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        from . import gguf_vectors

        direction = gguf_vectors.read(path)
    else:
        direction = _read(path)
    if policy is not None:
        check(direction, policy, str(path), force=force)
    return direction


def check(direction: Direction, policy: "Policy", name: str, *, force: bool | None = False) -> None:
    """UserError, which begins with `name`, where a direction does not fit a model.

    force: other weights are allowed; None: they are not, and who asks has no way to allow them.
    """
    about, model = direction.about, policy.model
    made = f"{name}: made on {about.base_model or 'another model'}, and {policy.name}"
    count, whole = len(blocks_of(model)), policy.body.whole  # shapes of a forward pass that is never computed
    width = policy.config.get("hidden_size") if whole else policy.body.hidden(mx.array([[0]])).shape[-1]
    if width not in (None, direction.width):
        raise UserError(f"{made} is {width} wide, not {direction.width}. Extract the direction on {policy.name}.")
    if beyond := [block for block in direction.blocks if not -1 <= block < count]:
        raise UserError(f"{made} has the blocks 0 to {count - 1}, no block {beyond[0]}. Extract the direction on it.")
    if about.base_hash and not force and about.base_hash != (found := policy.base_hash):
        raise UserError(
            f"{made} has other weights ({found}, not {about.base_hash}): another model, or the same one quantised to "
            f"other bits. Extract the direction on it{'' if force is None else ALIKE}."
        )


def spans(blocks: list[int]) -> str:
    """Blocks in words: 0 to 11, 14."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][-1] + 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _read(path: Path) -> Direction:
    try:
        untrusted.safetensors_header(path, MOST)
        with safe_open(path, framework="numpy") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. `mlx-realign steer extract` writes directions.") from None
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a complete safetensors file ({error}). Copy or extract it again.") from None
    if text is None:
        raise UserError(f"{path}: not a direction: its header has no {HEADER}. Extract one, or name a .gguf file.")
    return assemble(path, text, tensors)


def header(direction: Direction) -> str:
    """What a file says beside its vectors, JSON."""
    norms = {str(block): norm for block, norm in direction.median_norm.items()}
    return json.dumps(dataclasses.asdict(direction.about) | {"median_norm": norms})


def assemble(path: Path, text: str, tensors: Mapping[str, np.ndarray]) -> Direction:
    """The direction that a file holds, from its `header` and its tensors."""
    try:
        fields = untrusted.parse(text)
        norms = fields.pop("median_norm", {})
        about = _about(path, fields)
        found = {kind: by_block(tensors, kind) for kind in (VECTOR, BASELINE)}
        return Direction(found[VECTOR], about, found[BASELINE], {int(block): norm for block, norm in norms.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: its header or tensors are broken ({error}). Extract the direction again.") from None


def _about(path: Path, fields: dict[str, Any]) -> About:
    """The header as About; UserError for what this version would get wrong."""
    version = fields.get("version")
    if version != VERSION:
        raise UserError(f"{path}: its format is version {version}, and {VERSION} is read here. Update mlx-realign.")
    if unknown := fields.keys() - {f.name for f in dataclasses.fields(About)}:
        raise UserError(f"{path}: its header has an unknown field {min(unknown)!r}. Update mlx-realign.")
    for name, known in (("site", SITE), ("convention", CONVENTION)):
        if fields.get(name) != known:
            raise UserError(f"{path}: its {name} is {fields.get(name)!r}, only {known!r} can be used. Extract anew.")
    tuples: dict[str, Any] = {name: tuple(int(x) for x in fields[name]) for name in ("blocks", "template_prefix")}
    return About(**fields | tuples)


def by_block(tensors: Mapping[str, np.ndarray], kind: str) -> dict[int, np.ndarray]:
    """Block -> tensor, of the tensors whose name begins with `kind`."""
    return {int(name[len(kind) :]): value for name, value in tensors.items() if name.startswith(kind)}
