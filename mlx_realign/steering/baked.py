# SPDX-License-Identifier: Apache-2.0
"""Steering as weights: biases of a model folder, an adapter on embeddings, an adapter that ablates.

Which layer's bias arrives in the stream unchanged is found by trying: something is added to what the layer gives, and
the block must give the same more, or a multiple of it (Granite scales what its layers add). A layer in front of a norm
or of another layer of its block fails that.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .. import adapter, noise, taps, writers
from ..ablation import edit
from ..adapter_fuse import save_model
from ..adapter_layers import EMBEDDING, matrix_shape
from ..adapter_targets import adaptable
from ..errors import UserError
from ..loading import load_base
from ..policy import Policy
from .spec import Steer

CONSTANT = {mx.float32: 1e-3, mx.bfloat16: 1e-2, mx.float16: 1e-2}  # relative, of what arrives: less is rounding
LENGTHS = (4.0, 12.0)  # of what is added for a try, in lengths of the states: far above their rounding
ONE_FILE = "model.safetensors"
PROBE = mx.array([[5, 3, 8, 1, 9, 2]])


class Baked(NamedTuple):
    """What was written."""

    model: Path
    adapter: Path | None
    told: list[str]


# ------------------------------------------------------------------ biases


def bias_folder(
    policy: Policy, added: Mapping[int, np.ndarray], output: Path, *, trust_remote_code: bool, copy: bool
) -> Baked:
    """Write the policy's model with `added` [d] by block as biases. UserError where its architecture has no such bias.

    A bias that the architecture can have and this model lacks is switched on in config.json and put in a weight file
    of its own, the others linked; one that the model has is changed, and all weights are written.
    """
    base, config = load_base(policy.folder, trust_remote_code)
    own = {name for name, _ in named(base)}
    for flag in (None, *switches(base)):
        flagged = base if flag is None else fresh(base, **{flag: True})
        names = [name for name, _ in named(flagged) if name.endswith(".bias") and (flag is None or name not in own)]
        places = {block: place(policy, block, vector, names) for block, vector in added.items()}
        found = {block: known for block, known in places.items() if known}
        if len(found) < len(added):
            continue
        dtype = next(value.dtype for _, value in named(base) if mx.issubdtype(value.dtype, mx.floating))
        values = {path: mx.array(added[block] / times) for block, (path, times) in found.items()}
        if flag is None:
            return with_changed(policy, base, config, values, output)
        shapes = {name: value.shape for name, value in named(flagged) if name in names}
        biases = {name: values.get(name, mx.zeros(shape)).astype(dtype) for name, shape in shapes.items()}
        return with_linked(policy, biases, flag, output, copy)
    kind = config.get("model_type")
    raise UserError(
        f"--to mlx-lm: {kind} models have no bias that arrives behind block {min(added)} unchanged, so stock mlx-lm "
        "cannot add a vector there. --blocks -1 can be said as an adapter, or run it with `mlx-realign steer generate`."
    )


def named(model: nn.Module) -> list[tuple[str, mx.array]]:
    """Parameters by their names."""
    found: Any = tree_flatten(model.parameters())
    return found


def switches(model: nn.Module) -> list[str]:
    """Fields of a model's arguments that say it has biases, and are off; those of MLPs first."""
    args = getattr(model, "args", None)
    if not dataclasses.is_dataclass(args):
        return []
    off = [f.name for f in dataclasses.fields(args) if "bias" in f.name and getattr(args, f.name) is False]
    return sorted(off, key=lambda name: "mlp" not in name)


def fresh(model: nn.Module, **changes: Any) -> nn.Module:
    """A model of the same class with other arguments; its weights are not made as long as nobody looks at them."""
    kind: Any = type(model)
    args: Any = model.args
    return kind(dataclasses.replace(args, **changes))


def place(policy: Policy, block: int, vector: np.ndarray, biases: list[str]) -> tuple[str, float] | None:
    """The bias of this block that arrives behind it as a multiple of itself, and which multiple."""
    path = taps.blocks(policy.model)[block]
    modules = dict(policy.model.named_modules())
    for name in reversed([name for name in biases if name.startswith(path + ".")]):
        module = name.rpartition(".")[0]
        if module in modules and (times := arrives(policy, module, path, vector)) is not None:
            return name, times
    return None


def arrives(policy: Policy, module: str, block: str, vector: np.ndarray) -> float | None:
    """s, where a block gives s * vector more once `vector` is added to what a layer of it gives, however long it is."""
    seen: list[mx.array] = []

    def run(more: mx.array | None) -> np.ndarray | None:
        handles = [taps.put(policy.model, block, lambda x, _: (seen.append(x), x)[1])]
        if more is not None:
            handles.append(taps.put(policy.model, module, lambda y, _: y + more.astype(y.dtype)))
        try:
            policy.body.hidden(PROBE)
            return np.array(seen.pop().astype(mx.float32)).astype(np.float64)
        finally:
            for handle in handles:
                handle.remove()

    still = run(None)
    assert still is not None
    unit = vector / np.linalg.norm(vector)
    size = float(np.median(np.linalg.norm(still, axis=-1)))
    limit, found = CONSTANT[noise.judged_as(policy.dtype)], []
    for length in LENGTHS:
        try:
            moved = run(mx.array((length * size * unit).astype(np.float32)))
        except ValueError:  # of another width
            return None
        change = (moved - still) / (length * size)
        found.append(float((change @ unit).mean()))
        if np.linalg.norm(change - found[-1] * unit, axis=-1).max() > limit * abs(found[-1]):
            return None
    same = abs(found[0] - found[1]) <= limit * abs(found[0])
    return found[1] if same and found[1] else None


def with_changed(
    policy: Policy, base: nn.Module, config: dict[str, Any], values: Mapping[str, mx.array], output: Path
) -> Baked:
    """All weights written anew, some biases moved by `values`."""
    before = dict(named(base))
    moved = [
        (name, (before[name] + value.astype(mx.float32)).astype(before[name].dtype)) for name, value in values.items()
    ]
    base.load_weights(moved, strict=False)
    save_model(base, config, policy.folder, output)
    return Baked(output, None, [f"a model with {len(values)} of its biases moved"])


def with_linked(policy: Policy, biases: Mapping[str, mx.array], flag: str, output: Path, copy: bool) -> Baked:
    """The model's own files, a weight file of biases, and a config.json that switches them on."""
    output.mkdir(parents=True, exist_ok=True)
    weights = sorted(policy.folder.glob("model*.safetensors"))
    renamed = {ONE_FILE: "model-00001-of-00002.safetensors"} if [w.name for w in weights] == [ONE_FILE] else {}
    more = "model-00002-of-00002.safetensors" if renamed else "model-steering.safetensors"
    for file in policy.folder.iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith(".index.json"):
            large = file in weights and not copy
            (link if large else shutil.copyfile)(file.resolve(), output / renamed.get(file.name, file.name))
    mx.save_safetensors(str(output / more), dict(biases), metadata={"format": "mlx"})
    config = json.loads((policy.folder / "config.json").read_text(encoding="utf-8")) | {flag: True}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    where = {name: renamed.get(file.name, file.name) for file in weights for name in mx.load(str(file))}
    index = {"metadata": {}, "weight_map": where | dict.fromkeys(biases, more)}
    (output / f"{ONE_FILE}.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    used = sum(bool(mx.any(value)) for value in biases.values())
    how = "copied" if copy else "linked"
    told = f"the model's weights ({how}) and {len(biases)} biases ({flag}), {used} of them not zero"
    return Baked(output, None, [told])


def link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system cannot."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# ------------------------------------------------------------------ embeddings


def embedding_adapter(policy: Policy, vector: np.ndarray, output: Path) -> Baked:
    """Write an adapter that adds `vector` [d] to what block 0 reads, at every token. UserError where none can.

    A is 1 for every token and B the vector. Where the head is the embedding too, all logits of a token get the same
    number more, which changes no probability.
    """
    model = policy.model
    known = [path for path, layer in adaptable(model).items() if isinstance(layer, EMBEDDING)]
    paths = [path for path in known if matrix_shape(dict(model.named_modules())[path])[1] == len(vector)]
    if len(paths) != 1 or adapter.adapters_of(model):
        raise UserError("--to mlx-lm: this model has no single embedding that an adapter could be put on.")
    reads: list[mx.array] = []
    handle = taps.put(model, taps.blocks(model)[0], lambda x, _: (reads.append(x), x)[1], before=True)
    try:
        policy.body.hidden(PROBE)
        adapter.put_on(model, paths, rank=1, scale=1.0, dropout=0.0, dora=False)
        unit = vector / np.linalg.norm(vector)
        length = LENGTHS[0] * float(np.linalg.norm(np.array(reads[0].astype(mx.float32)), axis=-1).mean())
        set_vector(model, paths[0], length * unit)
        policy.body.hidden(PROBE)
        change = np.array((reads[1].astype(mx.float32) - reads[0]).astype(mx.float32)).astype(np.float64) / length
        times = float((change @ unit).mean())  # Gemma multiplies its embeddings
        gap = np.linalg.norm(change - times * unit, axis=-1).max()
        if not times or gap > CONSTANT[noise.judged_as(policy.dtype)] * abs(times):
            raise UserError("--to mlx-lm: what block 0 reads is not the embedding alone: the vector would not arrive.")
        set_vector(model, paths[0], vector / times)
        adapter.save(model, output, base_model=policy.name)
    finally:
        handle.remove()
    told = f"an adapter of rank 1 on {paths[0]}"
    return Baked(policy.folder, output, [told])


def set_vector(model: nn.Module, path: str, vector: np.ndarray) -> None:
    """Make the adapter on an embedding add `vector` to every token."""
    layer = adapter.adapters_of(model)[path]
    layer.lora_a, layer.lora_b = mx.ones(layer.lora_a.shape), mx.array(vector[None].astype(np.float32))


# ------------------------------------------------------------------ ablation


def ablation_adapter(policy: Policy, one: Steer, output: Path) -> Baked:
    """Write, and put on the policy, an adapter that takes each block's direction out of what its layers write.

    UserError where it is not ablated at all positions of all blocks: only then weights come near it.
    """
    count = len(taps.blocks(policy.model))
    whole = one.positions == "all" and one.schedule.kind == "constant" and one.condition is None
    if not whole or {*one.at} - {-1} != {*range(count)}:
        raise UserError(
            "--to mlx-lm: ablate can be said in weights, and nearly, only at all positions of all blocks "
            "(--positions all --blocks all), without a schedule or a condition."
        )
    found = writers.find(policy)
    directions = {block: one.direction.unit(block) for block in range(count)}
    edit.put_on(policy, edit.plan(found, directions, one.coefficient))
    adapter.save(policy.model, output, base_model=policy.name)
    told = f"an adapter of rank 1 on the {len(found)} layers that write to the residual stream"
    return Baked(policy.folder, output, [told])
