# SPDX-License-Identifier: Apache-2.0
"""An adapter written into the weights it adapts, with the error that storing them costs."""

import json
import shutil
from math import inf
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm import utils as mlx_lm_utils

from .adapter import adapters_of
from .adapter_layers import (
    Adapter,
    Base,
    DoRALinear,
    LoRAEmbedding,
    LoRASwitchLinear,
    base_of,
    dense_weight,
    quantisation,
)
from .errors import UserError


def quantised(model: nn.Module) -> bool:
    """Whether any layer is."""
    return any("scales" in module and hasattr(module, "bits") for _, module in model.named_modules())


def dequantise(model: nn.Module, config: dict[str, Any]) -> None:
    """All quantised layers become float ones, in the model and in what its config.json says."""
    mlx_lm_utils.dequantize_model(model)
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)


def fuse(model: nn.Module) -> float:
    """Replace every adapter by its base with the adapter added to the weights; quantised weights are quantised again.

    Sums are float32, stored in the base's dtype. Returns ||stored - exact|| / ||exact - base|| over all of them: the
    rounding of the weights as a share of the adapter, 0 is lossless and above 1 the adapter is lost in it.
    """
    error, size = mx.zeros(()), mx.zeros(())
    bases = []
    for path, layer in adapters_of(model).items():
        base = base_of(layer)
        before = dense_weight(base).astype(mx.float32)
        exact = fused_weight(layer, before)
        store(base, exact)
        error += (dense_weight(base).astype(mx.float32) - exact).square().sum()
        size += (exact - before).square().sum()
        mx.eval(error, size, base.parameters())  # one layer in float32 at a time
        bases.append((path, base))
    model.update_modules(tree_unflatten(bases))
    lost, added = float(mx.sqrt(error)), float(mx.sqrt(size))
    return lost / added if added else (inf if lost else 0.0)


def fused_weight(layer: Adapter, weight: mx.array) -> mx.array:
    """float32 weight of one layer with its adapter in it; `weight` is the base's, float32."""
    a, b = layer.lora_a, layer.scale * layer.lora_b
    if isinstance(layer, LoRASwitchLinear):
        return weight + b @ a
    if isinstance(layer, LoRAEmbedding):
        return weight + a @ b
    weight = weight + (a @ b).T
    if isinstance(layer, DoRALinear):
        norm = mx.linalg.norm(weight, axis=1, keepdims=True)
        return weight * (layer.m[:, None] / mx.maximum(norm, 1e-15))
    return weight


def store(base: Base, weight: mx.array) -> None:
    """Put a float32 weight into a layer in the form the layer keeps."""
    if "scales" not in base:
        base.weight = weight.astype(base.weight.dtype)
        return
    if base.get("global_scale") is not None:
        raise UserError(f"experts in {base.mode} with a global scale cannot be quantised again. Use --dequantize.")
    dtype = mx.bfloat16 if base.scales.dtype == mx.uint8 else base.scales.dtype
    base.weight, base.scales, *biases = mx.quantize(weight.astype(dtype), **quantisation(base))
    if biases:
        base.biases = biases[0]


def save_model(model: nn.Module, config: dict[str, Any], source: Path, folder: Path) -> None:
    """Write weights and config.json; everything else of the model's folder (tokenizer, template, code) is copied."""
    mlx_lm_utils.save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name != "config.json":
            shutil.copy(file, folder / file.name)
