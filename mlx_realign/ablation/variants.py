# SPDX-License-Identifier: Apache-2.0
"""Other edits than the plain projection: what they make of a weight, as a low-rank adapter or in the weights.

row-norm: rows keep their norms, as a DoRA adapter does exactly; some of the direction comes back. column-norm: columns,
the vectors that single inputs write, keep theirs, and nothing of the direction comes back; a change of full rank.
affine (ACE, arXiv:2411.09003): the component is set to its mean over the negatives, which takes a bias.
"""

from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .. import adapter, taps
from ..adapter_fuse import dequantise, quantised, save_model, store
from ..adapter_layers import Base
from ..errors import UserError
from ..loading import load_base
from ..policy import Policy
from ..writers import module_at
from .edit import Applied, Edit, Factors, factors_of, rows_of

Variant = Literal["plain", "projected", "biprojected", "row-norm", "column-norm", "affine"]
VARIANTS: tuple[str, ...] = get_args(Variant)
FULL_RANK = ("row-norm", "column-norm")  # those that keep norms
BIAS_FLAGS = ("attention_bias", "mlp_bias", "use_bias", "bias", "attention_out_bias")  # of mlx-lm's configurations

Means = Mapping[str, np.ndarray]  # path of a writer -> float64 [k], mean of B y over the negatives


class Stored(NamedTuple):
    """What writing edited weights has cost."""

    rounding: float  # of the stored weights, as a share of the edit
    left: dict[str, float]  # path -> norm of B W as stored, as a share of what it was; about |1 - weight| by itself
    back: dict[str, float]  # path -> norm of what rounding alone puts into B W, as the same share
    form: str  # of the stored weights: float32, bfloat16, 4-bit


def rewritten(variant: str, weight: np.ndarray, edit: Edit) -> np.ndarray:
    """The weight [..., out, in] of a writer after the edit, float32. row-norm and column-norm by `edit.weight` too."""
    basis = edit.directions.astype(np.float32)
    bare = weight - edit.weight * (basis.T @ (basis @ weight))
    if variant not in FULL_RANK:
        return bare
    axis = -1 if variant == "row-norm" else -2
    was, now = (np.linalg.norm(x, axis=axis, keepdims=True) for x in (weight, bare))
    return bare * (was / np.maximum(now, 1e-30))


def remainder(
    policy: Policy, edits: Sequence[Edit], variant: str, rank: int
) -> tuple[dict[str, Factors], dict[str, float]]:
    """What a variant of full rank has beyond the plain edit, by path: the best change of that rank, and its error.

    The edit is of the weight with the adapter that the policy carries, whose ranks stay. The error is the norm of what
    is missing as a share of the norm of the whole edit.
    """
    factors, errors, carried = {}, {}, adapter.adapters_of(policy.model)
    for edit in edits:
        weight = rows_of(module_at(policy.model, edit.writer.path))
        if edit.writer.path in carried:
            old = factors_of(carried[edit.writer.path])
            weight = weight + (old[0] @ old[1]).swapaxes(-1, -2).astype(np.float32)
        found = rewritten(variant, weight, edit)
        rest = found - rewritten("plain", weight, edit)
        matrices = rest if rest.ndim == 3 else rest[None]
        parts = [_best(matrix, rank) for matrix in matrices]
        a, b = (np.stack(sides) for sides in zip(*parts, strict=True))
        missing = matrices - (a @ b).swapaxes(-1, -2)
        errors[edit.writer.path] = float(np.linalg.norm(missing) / max(float(np.linalg.norm(found - weight)), 1e-30))
        factors[edit.writer.path] = (a, b) if rest.ndim == 3 else (a[0], b[0])
    return factors, errors


def _best(matrix: np.ndarray, rank: int) -> Factors:
    """A [in, rank] and B [rank, out] with (A B)^T the best approximation of a matrix [out, in] of that rank.

    By subspace iteration on a random start (Halko et al. 2011, SIAM Rev. 53:217), seeded.
    """
    width = min(rank + 8, *matrix.shape)
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], width)).astype(matrix.dtype)
    q = np.linalg.qr(matrix @ start)[0]
    for _ in range(3):
        q = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ q)[0])[0]
    u, s, v = np.linalg.svd(q.T @ matrix, full_matrices=False)
    kept = min(rank, len(s))
    a, b = np.zeros((matrix.shape[1], rank)), np.zeros((rank, matrix.shape[0]))
    a[:, :kept], b[:kept] = v[:kept].T, ((q @ u[:, :kept]) * s[:kept]).T
    return a, b


# ------------------------------------------------------------------ biases


def means_of(policy: Policy, edits: Sequence[Edit], prompts: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Path -> mean over prompts of B y at their last tokens, float64 [k]; of experts at all, whose order is mixed."""
    sums = {edit.writer.path: np.zeros(len(edit.directions)) for edit in edits}
    found: dict[str, mx.array] = {}
    handles = []

    def see(y: mx.array, path: str, basis: mx.array) -> mx.array:
        found[path] = y.astype(mx.float32) @ basis
        return y

    try:
        for edit in edits:
            path, basis = edit.writer.path, mx.array(edit.directions.T.astype(np.float32))
            handles.append(taps.put(policy.model, path, lambda y, _, path=path, basis=basis: see(y, path, basis)))
        for prompt in prompts:
            policy.body.hidden(mx.array([list(prompt)]))
            mx.eval(found)
            for edit in edits:
                if edit.writer.path not in found:  # an expert that no token was sent to
                    continue
                values = np.array(found[edit.writer.path])
                some = values if edit.writer.kind == "experts" else values[:, -1]
                sums[edit.writer.path] += some.reshape(-1, values.shape[-1]).mean(0)
        return {path: total / len(prompts) for path, total in sums.items()}
    finally:
        for handle in handles:
            handle.remove()


def _biased(layer: Any, edit: Edit, means: Means | None) -> mx.array | None:
    """The bias of a writer after the edit; None where it has none and needs none."""
    basis = edit.directions
    if "bias" not in layer and means is None:
        return None
    shape = layer.bias.shape if "bias" in layer else layer.weight.shape[:-1]
    bias = np.array(layer.bias.astype(mx.float32)).astype(np.float64) if "bias" in layer else np.zeros(shape)
    bias = bias - edit.weight * ((bias @ basis.T) @ basis)
    if means is not None:
        bias = bias + edit.weight * (means[edit.writer.path] @ basis)
    return mx.array(bias.astype(np.float32))


def hold_biases(model: nn.Module, config: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Give the layers at `paths` a bias of zeros, with whatever others the architecture wants then; the config for it.

    UserError where mlx-lm's code for the architecture has no setting that gives them one.
    """
    made: Any = model
    wanted, there = {f"{path}.bias" for path in paths}, _names(model)
    if wanted <= there.keys():
        return config
    known = [flag for flag in BIAS_FLAGS if hasattr(made.args, flag)] if hasattr(model, "args") else []
    for flags in chain.from_iterable(combinations(known, n + 1) for n in range(len(known))):
        changed = config | dict.fromkeys(flags, True)
        names = _names(type(made)(type(made.args).from_dict(changed)))
        new = names.keys() - there.keys()
        if wanted <= names.keys() and there.keys() <= names.keys() and all(name.endswith(".bias") for name in new):
            zeros = [(name, mx.zeros(names[name].shape, names[name].dtype)) for name in new]
            modules = dict(model.named_modules())
            for name, zero in zeros:
                modules[name.rpartition(".")[0]]["bias"] = zero
            return changed
    kind = config.get("model_type", "this architecture")
    raise UserError(
        f"--variant affine needs a bias in {paths[0]}, and mlx-lm's {kind} has none. Use --variant plain, or ablate at "
        "inference: mlx-realign steer with --operator affine."
    )


def _names(model: nn.Module) -> dict[str, mx.array]:
    return tree_flatten(model.parameters(), destination={})  # type: ignore[return-value]


# ------------------------------------------------------------------ in the weights


def rewrite(policy: Policy, edits: Sequence[Edit], variant: str, means: Means | None = None) -> Applied:
    """Put the edits into the weights of the model in memory, biases too. UserError where they are quantised."""
    if adapter.adapters_of(policy.model):
        raise UserError("--fuse with --adapter: fuse the adapter first (mlx-realign export --to fused).")
    before: dict[str, mx.array] = {}
    for edit in edits:
        layer, path = module_at(policy.model, edit.writer.path), edit.writer.path
        if "scales" in layer:
            raise UserError(f"{path}: is quantised, and holds no edit exactly. Leave --fuse off, or use --dequantize.")
        before[f"{path}.weight"] = layer.weight
        bias = _biased(layer, edit, means)
        if bias is not None:
            before[f"{path}.bias"] = layer.bias if "bias" in layer else mx.zeros(bias.shape, layer.weight.dtype)
            layer["bias"] = bias.astype(layer.weight.dtype)
        store(layer, mx.array(rewritten(variant, rows_of(layer), edit)))
        mx.eval(layer.parameters())
    policy.model.freeze()
    policy.refresh()
    return Applied(policy, edits, before)


def save_fused(
    source: Path,
    output: Path | None,
    edits: Sequence[Edit],
    variant: str,
    *,
    means: Means | None = None,
    force: bool = False,
    dequantize: bool = False,
    trust_remote_code: bool = False,
) -> Stored:
    """Write the model of a folder with the edits in its weights, as they are stored there; what storing has cost.

    UserError with that number where the weights are quantised, unless `force`. dequantize: as float weights instead.
    output None: nothing is written.
    """
    model, config = load_base(source, trust_remote_code)
    if dequantize:
        dequantise(model, config)
    if means is not None:
        config = hold_biases(model, config, [edit.writer.path for edit in edits])
    error, size, left, back, forms = 0.0, 0.0, {}, {}, {}
    for edit in edits:
        layer, path = module_at(model, edit.writer.path), edit.writer.path
        weight = rows_of(layer)
        exact = rewritten(variant, weight, edit)
        bias = _biased(layer, edit, means)
        if bias is not None:
            layer["bias"] = bias.astype(layer.bias.dtype)
        store(layer, mx.array(exact))
        mx.eval(layer.parameters())
        stored = rows_of(layer)
        error, size = error + float(((stored - exact) ** 2).sum()), size + float(((exact - weight) ** 2).sum())
        was, now, more = (float(np.linalg.norm(edit.directions @ x)) for x in (weight, stored, stored - exact))
        left[path], back[path] = (now / was, more / was) if was else (0.0, 0.0)
        forms[form(layer)] = None
    rounding = (error / size) ** 0.5 if size else 0.0
    if quantised(model) and not force:
        raise UserError(
            f"--fuse: {source} is quantised, and quantising the edited weights again would move them by "
            f"{rounding:.0%} of what the edit does and put {np.mean(list(back.values())):.1%} of the direction back "
            "into them. Leave --fuse off (the adapter is exact), or use --dequantize; --force quantises anyway."
        )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        save_model(model, config, source, output)
    return Stored(rounding, left, back, ", ".join(forms))


def form(layer: Base) -> str:
    """How a layer keeps its weight: float32, bfloat16, 4-bit."""
    return f"{layer.bits}-bit" if "scales" in layer else str(layer.weight.dtype).removeprefix("mlx.core.")
