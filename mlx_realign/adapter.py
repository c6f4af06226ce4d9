# SPDX-License-Identifier: Apache-2.0
"""The adapter of a model: put on, switched off and on, read and written.

`attach` freezes the model and wraps its linear layers; `set_enabled` turns the wrapped model into its base and back
without a second copy or a new trace; `save` and `load` keep mlx-lm's folder format, and `load` reads PEFT's as well.
"""

from math import sqrt
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .adapter_files import PEFT_WEIGHTS, WEIGHTS, AdapterFile, read_mlx, write_folder
from .adapter_layers import EMBEDDING, LINEAR, SWITCH, TRAINED, Adapter, Base, DoRALinear, base_of, matrix_shape, wrap
from .adapter_peft import read_peft
from .adapter_targets import adaptable, blocks_of, find_targets, in_order, is_router, tied_head
from .errors import UserError

SPARE = 4096  # tensors of an adapter's file beyond those that fit, which are then named


def attach(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: str = "all-linear",
    layers: int = -1,
    dora: bool = False,
    rslora: bool = False,
    seed: int = 0,
) -> list[str]:
    """Freeze `model` and wrap its targets in fresh adapters, which change nothing yet; returns their paths.

    targets: `all-linear` (linear and expert layers of the decoder blocks, never a router) and/or comma-separated
    names: `q_proj`, `self_attn.q_proj` or a whole path; `embed_tokens` and `lm_head` only by name. layers: the last n
    blocks, -1 all. The scale is alpha / rank, with rslora alpha / sqrt(rank).
    Raises UserError for an unknown target, a router, nothing to adapt, DoRA on experts or embeddings, rank < 1.
    """
    if rank < 1:
        raise UserError(f"--lora-rank is {rank}, expected 1 or more.")
    paths = find_targets(model, targets, layers)
    scale = alpha / (sqrt(rank) if rslora else rank)
    put_on(model, paths, rank=rank, scale=scale, dropout=dropout, dora=dora, seed=seed)
    return paths


def put_on(
    model: nn.Module, paths: list[str], *, rank: int, scale: float, dropout: float, dora: bool, seed: int = 0
) -> None:
    """Freeze `model` and wrap the modules at `paths`. UserError where DoRA has no layer for one of them."""
    if adapters_of(model):
        raise ValueError("the model carries an adapter already")
    modules = dict(model.named_modules())
    if dora and (others := [path for path in paths if not isinstance(modules[path], LINEAR)]):
        raise UserError(
            f"DoRA is for linear layers; {others[0]} is a {type(modules[others[0]]).__name__}. "
            "Leave --dora off, or name linear layers in --lora-targets."
        )
    model.freeze()
    keys = mx.random.split(mx.random.key(seed), len(paths))
    wrapped = [
        (path, wrap(modules[path], rank=rank, scale=scale, dropout=dropout, dora=dora, key=key))
        for path, key in zip(paths, keys, strict=True)
    ]
    model.update_modules(tree_unflatten(wrapped))


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """Path -> adapter layer, blocks in order."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, Adapter)}
    return {path: found[path] for path in sorted(found, key=in_order)}


def set_enabled(model: nn.Module, on: bool) -> None:
    """Adapters on, or off: then the model is its base exactly. Traces with `model.state` among their inputs follow."""
    for layer in adapters_of(model).values():
        layer.enable(on)


def set_dropout_key(model: nn.Module, key: mx.array | None) -> None:
    """One key per layer from `key`; None turns dropout off. The same key draws the same masks, recomputed ones too."""
    layers = list(adapters_of(model).values())
    keys = [None] * len(layers) if key is None else mx.random.split(key, len(layers))
    for layer, own in zip(layers, keys, strict=True):
        layer._dropout_key = own


def state(model: nn.Module) -> dict[str, mx.array]:
    """The adapter's arrays as files name them: "model.layers.0.self_attn.q_proj.lora_a" -> float32."""
    return {
        f"{path}.{leaf}": layer[leaf] for path, layer in adapters_of(model).items() for leaf in TRAINED if leaf in layer
    }


def save(model: nn.Module, folder: str | Path, *, base_model: str, extra: dict[str, Any] | None = None) -> None:
    """Write adapters.safetensors and adapter_config.json, which stock mlx-lm loads with `--adapter-path`.

    base_model: folder or hub id, kept under `model`; extra: more keys for the JSON. A file appears whole or not at all.
    """
    layers = adapters_of(model)
    if not layers:
        raise ValueError("the model carries no adapter")
    first = next(iter(layers.values()))
    keys, num_layers = _keys(model, list(layers))
    config = {
        "model": base_model,
        "fine_tune_type": "dora" if isinstance(first, DoRALinear) else "lora",
        "num_layers": num_layers,
        "lora_parameters": {"rank": rank_of(first), "scale": first.scale, "dropout": first.dropout, "keys": keys},
    }
    write_folder(Path(folder), WEIGHTS, state(model), {**(extra or {}), **config})


def _keys(model: nn.Module, paths: list[str]) -> tuple[list[str], int]:
    """mlx-lm's way to say which layers: names inside the last n blocks (n <= 0: all), whole paths elsewhere.

    Where blocks differ in what is adapted, whole paths say it exactly.
    """
    blocks = blocks_of(model)
    relative: dict[str, set[str]] = {block: set() for block in blocks}
    outside = []
    for path in paths:
        home = next((block for block in blocks if path.startswith(block + ".")), None)
        if home is None:
            outside.append(path)
        else:
            relative[home].add(path[len(home) + 1 :])
    count = sum(bool(keys) for keys in relative.values())
    union = set().union(*relative.values())
    modules = {path for path, _ in model.named_modules()}
    meant = {f"{block}.{key}" for block in blocks[-count:] for key in union} & modules if count else set()
    if meant != set(paths) - set(outside):
        return paths, -1
    return sorted(union) + outside, -1 if count == len(blocks) else count


def rank_of(layer: Adapter) -> int:
    """r of an adapter layer."""
    return layer.lora_a.shape[1]


def load(model: nn.Module, folder: str | Path, *, dropout: float | None = None) -> AdapterFile:
    """Read an mlx-lm or PEFT adapter folder into `model`, put on first where the model has none; returns what was read.

    dropout: for further training, instead of the file's. An adapted router is read, but stays frozen.
    Raises UserError, naming every tensor that does not fit.
    """
    folder = Path(folder)
    layers = adapters_of(model)
    bases = {path: base_of(layer) for path, layer in layers.items()} or adaptable(model, routers=True)
    most = 4 * sum(getattr(base, "num_experts", 1) for base in bases.values()) + SPARE
    peft = (folder / PEFT_WEIGHTS).exists()
    file = read_peft(folder, bases, tied_head(model), most) if peft else read_mlx(folder, most)
    refuse_misfits(file, bases, complete=bool(layers))
    rate = file.dropout if dropout is None else dropout
    if not layers:
        put_on(model, list(file.modules()), rank=file.rank, scale=file.scale, dropout=rate, dora=file.dora)
        layers = adapters_of(model)
    for path, tensors in file.modules().items():
        layer = layers[path]
        layer.update({leaf: tensor.astype(mx.float32) for leaf, tensor in tensors.items()})
        layer.scale, layer.dropout = file.scale, rate
        if is_router(path):
            layer.freeze()
    set_enabled(model, True)
    return file


def refuse_misfits(file: AdapterFile, bases: dict[str, Base], complete: bool) -> None:
    """UserError naming every tensor that is unknown, misshapen or not finite; if `complete`, every missing one too."""
    wrong = []
    modules = file.modules()
    for path in sorted({*modules, *(bases if complete else ())}, key=in_order):
        if path not in bases:
            wrong += [
                f"{path}.{leaf}: no such layer to adapt in the model".lstrip(".") for leaf in sorted(modules[path])
            ]
            continue
        expected, found = shapes(bases[path], file.rank, file.dora), modules.get(path, {})
        wrong += [f"{path}.{leaf}: not part of such an adapter" for leaf in found if leaf not in expected]
        for leaf, shape in expected.items():
            if leaf not in found:
                wrong.append(f"{path}.{leaf}: missing")
            elif found[leaf].shape != shape:
                wrong.append(f"{path}.{leaf}: shape {found[leaf].shape}, expected {shape}")
            elif not mx.issubdtype(found[leaf].dtype, mx.floating) or not mx.isfinite(found[leaf]).all():
                wrong.append(f"{path}.{leaf}: holds something other than finite numbers")
    if wrong:
        shown = "\n".join(f"  {line}" for line in wrong[:20])
        more = f"\n  and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise UserError(
            f"{file.folder}: this adapter (rank {file.rank}) does not fit the model. Give the model it was made for.\n"
            f"{shown}{more}"
        )


def shapes(base: Base, rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
    """Leaf name -> shape of the adapter of `base`."""
    outputs, inputs = matrix_shape(base)
    if isinstance(base, SWITCH):
        experts = base.num_experts
        return {"lora_a": (experts, rank, base.input_dims), "lora_b": (experts, base.output_dims, rank)}
    if isinstance(base, EMBEDDING):
        return {"lora_a": (outputs, rank), "lora_b": (rank, inputs)}
    pair = {"lora_a": (inputs, rank), "lora_b": (rank, outputs)}
    return {**pair, "m": (outputs,)} if dora else pair
