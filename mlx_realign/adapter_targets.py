# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model an adapter goes on: found by walking its modules, whatever the architecture."""

import ast
import inspect
from functools import cache
from importlib import import_module

import mlx.nn as nn

from .adapter_layers import EMBEDDING, LINEAR, SWITCH, matrix_shape
from .errors import UserError

# What chooses experts, or the keys that sparse attention sees. A choice has no gradient of its own, and moving a router
# changes which expert is trained.
CHOOSERS = ("gate", "router", "shared_expert_gate", "indexer")
SETUP = ("__init__", "sanitize", "shard")  # functions of a model that prepare weights and do not compute with them


def find_targets(model: nn.Module, targets: str = "all-linear", layers: int = -1) -> list[str]:
    """Paths of the modules that `targets` and `layers` mean (see attach), blocks in order. Raises UserError."""
    known = adaptable(model)
    blocks = blocks_of(model)
    inside = tuple(path + "." for path in blocks)
    chosen = inside[-layers:] if layers > 0 else inside
    found: set[str] = set()
    for target in filter(None, (part.strip() for part in targets.split(","))):
        if target == "all-linear":
            hits = [
                path for path, layer in known.items() if path.startswith(inside) and not isinstance(layer, EMBEDDING)
            ]
        else:
            hits = [path for path in known if names(target, path)]
        if not hits:
            raise UserError(_unknown_target(model, target, known))
        found.update(path for path in hits if path.startswith(chosen) or not path.startswith(inside))
    if not found:
        raise UserError(f"--lora-targets {targets!r} with --lora-layers {layers} leaves nothing to adapt.")
    return [path for path in known if path in found]


def names(target: str, path: str) -> bool:
    """Whether `target` is the path or its end, whole parts only."""
    return path == target or path.endswith("." + target)


def _unknown_target(model: nn.Module, target: str, known: dict[str, nn.Module]) -> str:
    for path, module in model.named_modules():
        if names(target, path) and isinstance(module, LINEAR) and is_router(path):
            return f"--lora-targets: {path} routes tokens to experts and is never adapted. Leave it out."
    choices = sorted({path.rpartition(".")[2] for path in known})
    return f"--lora-targets: no layer is called {target!r}. Known here: all-linear, {', '.join(choices)}."


def adaptable(model: nn.Module, routers: bool = False) -> dict[str, nn.Module]:
    """Path -> module of every layer an adapter fits on, blocks in order; a layer used twice counts once.

    Left alone: layers that return several arrays (mlx-lm gives those `to_lora`, an adapter form of their own), and
    layers whose weight the model's code reads instead of calling them, for that would go past the adapter.
    """
    found: dict[int, tuple[str, nn.Module]] = {}
    modules = dict(model.named_modules())
    for path, module in sorted(modules.items(), key=lambda item: in_order(item[0])):
        parent, _, name = path.rpartition(".")
        fits = isinstance(module, LINEAR + SWITCH + EMBEDDING) and not hasattr(module, "to_lora")
        fits = fits and not (parent in modules and name in weights_read(type(modules[parent])))
        if fits and (routers or not is_router(path)):
            found.setdefault(id(module), (path, module))
    return dict(found.values())


def weights_read(owner: type) -> frozenset[str]:
    """Names of layers whose `.weight` is read by the forward code of the file that defines `owner` or its parents."""
    homes = {cls.__module__ for cls in owner.__mro__ if cls.__module__.startswith("mlx_lm.models.")}
    return frozenset(name for home in homes for name in _weights_read_in(home))


@cache
def _weights_read_in(module: str) -> frozenset[str]:
    tree = ast.parse(inspect.getsource(import_module(module)))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name not in SETUP]
    reads = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Attribute)]
    layers = [node.value for node in reads if node.attr == "weight"]
    return frozenset(layer.attr for layer in layers if isinstance(layer, ast.Attribute))


def is_router(path: str) -> bool:
    """Whether the layer at `path` is, or belongs to, what chooses experts or keys."""
    return any(part in CHOOSERS or "router" in part for part in path.split("."))


def blocks_of(model: nn.Module) -> list[str]:
    """Paths of the decoder blocks, in the order of mlx-lm's `model.layers`."""
    paths = {id(module): path for path, module in model.named_modules()}
    return [paths[id(block)] for block in getattr(model, "layers", ()) if id(block) in paths]


def in_order(path: str) -> list[tuple[int, str]]:
    """Sort key of paths that puts block 2 before block 10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 10 else (-1, part) for part in path.split(".")]


def tied_head(model: nn.Module) -> bool:
    """Whether the model has no head of its own and scores tokens with its embedding."""
    blocks = tuple(path + "." for path in blocks_of(model))
    outside = [module for path, module in model.named_modules() if not path.startswith(blocks)]
    vocabularies = {matrix_shape(module)[0] for module in outside if isinstance(module, EMBEDDING)}
    return not any(isinstance(module, LINEAR) and matrix_shape(module)[0] in vocabularies for module in outside)
