# SPDX-License-Identifier: Apache-2.0
"""Directions taken out of what writers give, as an adapter: y <- y - weight * B^T B y with B [k, d] orthonormal.

W - weight * B^T (B W) is a LoRA of rank k, exactly: A = (B W)^T, B = -weight * B. The base is not touched, so that
quantised weights lose nothing, and the adapter off is the original. An adapter that the policy carries already stays:
its ranks and those of the edit stand side by side, the edit being made with respect to the sum.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from .. import adapter, taps
from ..adapter_layers import Adapter, Base, DoRALinear, LoRAEmbedding, base_of, quantisation
from ..errors import UserError
from ..policy import Policy
from ..writers import Writer, module_at

Factors = tuple[np.ndarray, np.ndarray]  # A [..., in, r] and B [..., r, out] of a change A B of a weight's transpose
ROUNDING = 1e-6  # of a share of a bias
PIECE = 1 << 24  # entries of a weight that are held in float64 at a time


@dataclass(frozen=True, eq=False)
class Edit:
    """What one writer loses."""

    writer: Writer
    directions: np.ndarray  # float64 [k, d], orthonormal, the writer's gain applied (Writer.basis)
    weight: float = 1.0  # 1: all of it; 0: nothing


class Applied:
    """Edits that are on a policy, and the way back."""

    def __init__(self, policy: Policy, edits: Sequence[Edit], before: dict[str, mx.array]) -> None:
        self.policy, self.edits, self.before = policy, list(edits), before

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the policy is what it was before the edits (to the rounding of x + 0 * y, and of DoRA's norms)."""
        current = dict(_leaves(self.policy.model, self.before))
        self.policy.model.load_weights(list(self.before.items()), strict=False)
        try:
            yield
        finally:
            self.policy.model.load_weights(list(current.items()), strict=False)


def plan(
    writers: Sequence[Writer],
    directions: np.ndarray | Mapping[int, np.ndarray],
    weight: float | Callable[[Writer], float] = 1.0,
) -> list[Edit]:
    """One edit per writer. directions: [d] or [k, d] for all, or by block; writers of a block without any get none."""
    edits = []
    for writer in writers:
        rows = directions.get(writer.block) if isinstance(directions, Mapping) else directions
        if rows is not None:
            edits.append(Edit(writer, writer.basis(rows), weight(writer) if callable(weight) else weight))
    return edits


def put_on(
    policy: Policy, edits: Sequence[Edit], *, dora: bool = False, more: Mapping[str, Factors] | None = None
) -> Applied:
    """Put the edits on the policy as an adapter of scale 1, one rank for all, shorter ones padded with zeros.

    dora: rows of the edited matrices keep their norms (m = those of the base), which gives some of the directions back.
    more: by path, ranks to add to those of an edit. Raises UserError for a DoRA adapter already there, and for dora on
    experts or beside an adapter.
    """
    model = policy.model
    carried = adapter.adapters_of(model)
    _refuse(carried, edits, dora)
    old = {path: factors_of(layer) for path, layer in carried.items()}
    new = {edit.writer.path: _low_rank(model, edit, old.get(edit.writer.path)) for edit in edits}
    new |= {path: _joined(new[path], factors) for path, factors in (more or {}).items()}
    wide, added = (max((a.shape[-1] for a, _ in some.values()), default=0) for some in (old, new))
    rank = wide + added
    model.update_modules(tree_unflatten([(path, base_of(layer)) for path, layer in carried.items()]))
    paths = list({**old, **new})
    adapter.put_on(model, paths, rank=rank, scale=1.0, dropout=0.0, dora=dora)
    layers, now, before = adapter.adapters_of(model), {}, {}
    for path in paths:
        a, b = _side_by_side(old.get(path), new.get(path), wide, rank, layers[path])
        now |= {f"{path}.lora_a": _like(layers[path], a), f"{path}.lora_b": _like(layers[path], b)}
        kept = np.concatenate([b[..., :wide, :], np.zeros_like(b[..., wide:, :])], -2)
        before[f"{path}.lora_b"] = _like(layers[path], kept)
    model.load_weights(list(now.items()), strict=False)
    policy.refresh()
    policy.mark_start()
    mx.eval(model.parameters(), list(before.values()))
    return Applied(policy, edits, before)


# ------------------------------------------------------------------ what is left


def leaks(applied: Applied, tokens: mx.array | None = None) -> dict[str, float]:
    """Path -> root mean square of B y after the edit, as a share of what it was before; over random tokens.

    tokens: int32 [rows, columns] to run instead. What a writer reads differs a little between the two runs, since
    earlier writers are edited too.
    """
    policy = applied.policy
    asked = random_tokens(policy) if tokens is None else tokens
    after = _components(policy, applied.edits, asked)
    with applied.off():
        before = _components(policy, applied.edits, asked)
    return {path: after[path] / before[path] if before[path] else 0.0 for path in after}


def left_in_blocks(
    policy: Policy, directions: np.ndarray | Mapping[int, np.ndarray], tokens: mx.array | None = None
) -> dict[int, float]:
    """Block -> norm of the part along its directions in what it adds to the stream, as a share of all it adds."""
    reads: dict[int, mx.array] = {}
    shares: dict[int, mx.array] = {}
    paths = taps.blocks(policy.model)
    wanted = dict(directions) if isinstance(directions, Mapping) else dict.fromkeys(range(len(paths)), directions)
    bases = {b: mx.array(np.linalg.qr(np.atleast_2d(rows).T)[0].astype(np.float32)) for b, rows in wanted.items()}

    def read(x: mx.array, block: int) -> mx.array:
        reads[block] = x
        return x

    def see(x: mx.array, block: int) -> mx.array:
        added = x.astype(mx.float32) - reads[block].astype(mx.float32)
        shares[block] = mx.linalg.norm(added @ bases[block]) / mx.maximum(mx.linalg.norm(added), 1e-30)
        return x

    handles = []
    try:
        for b in bases:
            handles.append(taps.put(policy.model, paths[b], lambda x, _, b=b: read(x, b), before=True))
            handles.append(taps.put(policy.model, paths[b], lambda x, _, b=b: see(x, b)))
        policy.body.hidden(random_tokens(policy) if tokens is None else tokens)
        return {block: float(np.array(share)) for block, share in shares.items()}
    finally:
        for handle in handles:
            handle.remove()


def bias_left(policy: Policy, edits: Sequence[Edit]) -> dict[str, float]:
    """Path -> |B b| / |b| of the writers that have a bias b, which no low-rank adapter changes; those at 0 left out."""
    found = {}
    for edit in edits:
        layer = module_at(policy.model, edit.writer.path)
        if "bias" in layer:
            bias = np.array(layer.bias.astype(mx.float32)).astype(np.float64)
            size = float(np.linalg.norm(bias))
            share = float(np.linalg.norm(bias @ edit.directions.T)) / size if size else 0.0
            found |= {edit.writer.path: share} if share > ROUNDING else {}
    return found


def random_tokens(policy: Policy, rows: int = 4, columns: int = 16) -> mx.array:
    """int32 [rows, columns]."""
    return mx.random.randint(0, policy.vocabulary, (rows, columns), key=mx.random.key(1))


def _components(policy: Policy, edits: Sequence[Edit], tokens: mx.array) -> dict[str, float]:
    found: dict[str, mx.array] = {}
    handles = []

    def see(y: mx.array, path: str, basis: mx.array) -> mx.array:
        size = mx.sqrt((y.astype(mx.float32) @ basis).square().mean())
        found[path] = mx.maximum(found[path], size) if path in found else size  # an expert may be called token by token
        return y

    try:
        for edit in edits:
            path, basis = edit.writer.path, mx.array(edit.directions.T.astype(np.float32))
            handles.append(taps.put(policy.model, path, lambda y, _, path=path, basis=basis: see(y, path, basis)))
        policy.body.hidden(tokens)
        return {edit.writer.path: float(np.array(found.get(edit.writer.path, 0.0))) for edit in edits}
    finally:
        for handle in handles:
            handle.remove()


# ------------------------------------------------------------------ numbers


def components(layer: Base, basis: np.ndarray) -> np.ndarray:
    """B W: float64 [k, in] of basis [k, out], of experts [E, k, in]; in pieces, dequantised in float32."""
    weight: mx.array = layer.weight
    experts = weight.shape[0] if weight.ndim == 3 else 1
    outputs, width = weight.shape[-2], weight.shape[-1]
    if "scales" in layer:
        width = layer.scales.shape[-1] * layer.group_size
    step = max(1, PIECE // (width * experts))
    pieces = [
        basis[:, start : start + step] @ rows_of(layer, start, start + step).astype(np.float64)
        for start in range(0, outputs, step)
    ]
    return np.sum(pieces, 0)


def rows_of(layer: Base, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows of a layer's weight (of every expert's), float32 [..., rows, in]."""
    weight = layer.weight[..., start:stop, :]
    if "scales" not in layer:
        return np.array(weight.astype(mx.float32))
    if layer.get("global_scale") is not None:
        raise UserError("weights in nvfp4 with a scale per expert cannot be edited. Use a model in another format.")
    parts = [layer[name][..., start:stop, :] for name in ("scales", "biases") if layer.get(name) is not None]
    parts = [part.astype(mx.float32) if mx.issubdtype(part.dtype, mx.floating) else part for part in parts]
    return np.array(mx.dequantize(weight, *parts, **quantisation(layer)).astype(mx.float32))


def factors_of(layer: Adapter) -> Factors:
    """A [..., in, r] and B [..., r, out] of an adapter, its scale in B; float64."""
    a, b = np.array(layer.lora_a).astype(np.float64), layer.scale * np.array(layer.lora_b).astype(np.float64)
    return (a.swapaxes(-1, -2), b.swapaxes(-1, -2)) if a.ndim == 3 else (a, b)


def _low_rank(model: nn.Module, edit: Edit, old: Factors | None) -> Factors:
    """As `factors_of`, of an edit with respect to the weight and the adapter that is on it."""
    basis = edit.directions
    a = components(module_at(model, edit.writer.path), basis).swapaxes(-1, -2)
    if old is not None:
        a = a + old[0] @ (old[1] @ basis.T)
    return a, np.broadcast_to(-edit.weight * basis, (*a.shape[:-2], *basis.shape))


def _joined(one: Factors, other: Factors) -> Factors:
    return np.concatenate([one[0], other[0]], -1), np.concatenate([one[1], other[1]], -2)


def _side_by_side(old: Factors | None, new: Factors | None, wide: int, rank: int, layer: Any) -> Factors:
    """A [..., in, rank] and B [..., rank, out]: the old ranks, the new ones, zeros where there are none."""
    embedding = isinstance(layer, LoRAEmbedding)
    a_shape, b_shape = layer.lora_a.shape, layer.lora_b.shape
    if len(a_shape) == 3:
        a_shape, b_shape = (a_shape[0], a_shape[2], rank), (b_shape[0], rank, b_shape[1])
    a, b = np.zeros(a_shape), np.zeros(b_shape)
    for at, factors in ((0, old), (wide, None if embedding else new)):
        if factors is not None:
            count = factors[0].shape[-1]
            a[..., at : at + count], b[..., at : at + count, :] = factors
    return a, b


def _like(layer: Adapter, factor: np.ndarray) -> mx.array:
    """float32, in the layout of the layer: experts keep both factors transposed."""
    return mx.array((factor.swapaxes(-1, -2) if layer.lora_a.ndim == 3 else factor).astype(np.float32))


def _leaves(model: nn.Module, names: Mapping[str, Any]) -> Iterator[tuple[str, mx.array]]:
    modules = dict(model.named_modules())
    for name in names:
        path, _, leaf = name.rpartition(".")
        yield name, modules[path][leaf]


def _refuse(carried: Mapping[str, Adapter], edits: Sequence[Edit], dora: bool) -> None:
    if any(isinstance(layer, DoRALinear) for layer in carried.values()):
        raise UserError(
            "--adapter: is a DoRA adapter, whose norms an ablation would change. Fuse it first: export --to fused."
        )
    if dora and carried:
        raise UserError(
            "--variant row-norm keeps the norms of the base's rows, and --adapter is a change of them. Fuse that first."
        )
    if dora and (experts := [edit.writer.path for edit in edits if edit.writer.kind == "experts"]):
        raise UserError(f"--variant row-norm: DoRA has no form for experts ({experts[0]}). Use --rank, or --fuse.")
