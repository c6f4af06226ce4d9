# SPDX-License-Identifier: Apache-2.0
"""What a model and its adapter are, as short hashes: equal iff the numbers are, wherever the files came from."""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from . import adapter
from .adapter_layers import TRAINED

BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}  # bytes of an entry -> integers of that size
CHUNK = 1 << 21  # entries looked at together


def base(model: nn.Module) -> str:
    """Of everything but the adapter; wrapping a layer in an adapter does not change it."""
    tensors: dict[str, mx.array] = tree_flatten(model.parameters(), destination={})  # type: ignore[assignment]
    own = [(path, value) for path, value in tensors.items() if path.rpartition(".")[2] not in TRAINED]
    return of((path.replace(".linear.", ".").replace(".embedding.", "."), value) for path, value in own)


def stored(folder: Path, quantized: int | None = None) -> str:
    """Of the tensors in a model's folder, and the bits they are quantised to at load: alike at any dtype, anywhere.

    "" where the folder holds no weights.
    """
    found = {}
    for file in sorted(folder.glob("model*.safetensors")) if (folder / "config.json").is_file() else ():
        tensors: dict[str, mx.array] = mx.load(str(file))  # type: ignore[assignment]
        found |= {name: of([(name, tensors.pop(name))]) for name in sorted(tensors)}  # popped: read, not kept
    return blake2b(repr((sorted(found.items()), quantized)).encode(), digest_size=12).hexdigest() if found else ""


def adapters(model: nn.Module) -> str:
    """Of the adapter, its scales included; "" where there is none."""
    scales = {path: layer.scale for path, layer in adapter.adapters_of(model).items()}
    return of(adapter.state(model).items(), extra=repr(sorted(scales.items()))) if scales else ""


def of(tensors: Iterable[tuple[str, mx.array]], extra: str = "") -> str:
    """Of names, shapes, dtypes and contents. The bits of each row are summed as integers, weighted by their place.

    Exact, at the speed of memory: no single entry can change and no two can be exchanged unnoticed.
    """
    digest = blake2b(extra.encode(), digest_size=12)
    for path, value in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{path} {value.shape} {value.dtype}".encode())
        columns = value.shape[-1] if value.ndim else 1
        rows = value.reshape(-1, columns) if value.size else value.reshape(0, 1)
        places = 2 * mx.arange(columns, dtype=mx.uint32) + 1
        few = max(1, CHUNK // columns)
        for start in range(0, rows.shape[0], few):  # so that no copy of a large tensor is made
            bits = rows[start : start + few].view(BITS[value.dtype.size]).astype(mx.uint32)
            digest.update(np.array((bits * places).sum(-1)).tobytes())
    return digest.hexdigest()
