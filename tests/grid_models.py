# SPDX-License-Identifier: Apache-2.0
"""Tiny models of every file in mlx-lm's models folder, and what mlx-lm itself, untouched, says of them.

Weights are random and spread, so that every part of a model has a say: nothing at zero, no gain at one. The reference
is mlx-lm's model, loaded by mlx-lm from the same folder with the adapter that was saved; one row at a time, unpadded.
"""

import ast
import json
import sys
import tomllib
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.models.activations as activations
import mlx_lm.models.base as attention
import numpy as np
from conftest import VOCAB_SIZE, write_tokenizer
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lm.utils import _get_classes, load_adapters, load_model, quantize_model, save_config, save_model

from mlx_realign.batch import Completion, Example

WIDTH = 64  # of the residual stream of all of them
CONFIGS = tomllib.loads((Path(__file__).parent / "grid_configs.toml").read_text())
ARCHITECTURES: list[str] = list(CONFIGS["models"])
# Prompts longer and shorter than the windows of 8, one of a single token; several completions, longer ones too.
SHAPES = ((14, (5, 9)), (3, (12, 1, 6)), (1, (4,)), (24, (7, 11)))
SPARED = ("conv", "A_log", "dt_", "x_", "k_k", "k_a", "r_k", "loop")  # matrices by shape, but no weights of a layer
elsewhere: Callable[[], AbstractContextManager[None]] = nullcontext  # around all that mlx-lm computes for comparison
OWN: dict[str, Any] = {
    "scaled_dot_product_attention": attention.scaled_dot_product_attention,
    "swiglu": activations.swiglu,
}


def model_files() -> list[str]:
    """Names of the installed mlx-lm's files that hold a model, by their source: importing one may end the process."""
    folder = Path(mlx_lm.__file__).parent / "models"
    return sorted(path.stem for path in folder.glob("*.py") if _has_model(path.read_text(encoding="utf-8")))


def _has_model(source: str) -> bool:
    """Whether it defines a Model, or takes another file's for its own."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Model":
            return True
        if isinstance(node, ast.ImportFrom) and any((name.asname or name.name) == "Model" for name in node.names):
            return True
    return False


def model_config(arch: str) -> dict[str, Any]:
    """Its config.json."""
    return {**_config(CONFIGS["models"][arch], arch), "eos_token_id": 257, "pad_token_id": 258}


def _config(own: dict[str, Any], name: str) -> dict[str, Any]:
    parts = [CONFIGS["parts"][part] for part in ("base", *own.get("parts", ()))]
    found: dict[str, Any] = {"model_type": name}
    for keys in (*parts, own):
        found |= {key: None if value == "none" else value for key, value in keys.items() if key != "parts"}
    if "text_config" in own:
        found["text_config"] = _config(own["text_config"], name)
    return json.loads(json.dumps(found))


def write_folder(folder: Path, arch: str) -> Path:
    """A Hugging Face folder with a tiny random float32 model; of one that mlx-lm cannot make here, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model_config(arch), indent=1))
    write_tokenizer(folder)
    try:
        model_class, args_class = _get_classes(model_config(arch))
        mx.random.seed(1)
        model = model_class(args_class.from_dict(model_config(arch)))
        model.update(tree_map_with_path(_spread, model.parameters()))
        mx.eval(model.parameters())
    except (Exception, SystemExit):  # one file of mlx-lm ends the process where a package is missing
        mx.save_safetensors(str(folder / "model.safetensors"), {"nothing": mx.zeros(1)})
    else:
        save_model(folder, model)
    return folder


def write_packed(folder: Path, arch: str) -> Path:
    """The same in bfloat16 and 4 bits, as mlx-lm converts and quantises it; groups of 32, as its widths want."""
    with pristine(), redirect_stdout(sys.stderr):
        model, config = load_model(write_folder(folder, arch))
        spared = getattr(model, "cast_predicate", lambda _: True)
        cast = lambda k, x: x.astype(mx.bfloat16) if spared(k) and mx.issubdtype(x.dtype, mx.floating) else x  # noqa: E731
        model.update(tree_map_with_path(cast, model.parameters()))
        model, config = quantize_model(model, config, group_size=32, bits=4)
        save_model(folder, model)
        save_config(config, folder / "config.json")
    return folder


def _spread(path: str, x: mx.array) -> mx.array:
    if not mx.issubdtype(x.dtype, mx.floating):
        return x
    noise = mx.random.normal(x.shape, key=mx.random.key(zlib.crc32(path.encode()))).astype(x.dtype)
    if x.ndim >= 2 and not any(part in path for part in SPARED):
        return x * 1.5 if mx.any(x).item() else 0.2 * noise
    return x + 0.05 * noise


# ------------------------------------------------------------------ mlx-lm


def load_stock(folder: Path, adapter: Path | None = None, dtype: mx.Dtype | None = None) -> Any:
    """mlx-lm's own model with an adapter that mlx-lm puts on itself; dtype: of all its floats, if not as they are."""
    with pristine():
        model = load_model(folder)[0]
        if adapter is not None:
            model = load_adapters(model, str(adapter))
        if dtype is not None:
            model.set_dtype(dtype)
        model.eval()
        return model


@contextmanager
def pristine() -> Iterator[None]:
    """Inside, mlx-lm's modules use their own attention and activation, whoever had exchanged them."""
    kept = []
    for module in [m for name, m in sys.modules.items() if name.startswith("mlx_lm.models.")]:
        for name, own in OWN.items():
            if vars(module).get(name, own) is not own:
                kept.append((module, name, vars(module)[name]))
                setattr(module, name, own)
    try:
        with elsewhere():
            yield
    finally:
        for module, name, before in kept:
            setattr(module, name, before)


def logits(model: Any, tokens: Any) -> np.ndarray:
    """float64 [T, vocabulary] of one row of tokens [T]."""
    with pristine():
        return np.array(model(mx.array(tokens)[None])[0].astype(mx.float32)).astype(np.float64)


def stock_logps(model: Any, prompt: np.ndarray, tokens: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """float64 [len(tokens)]."""
    found = logits(model, np.concatenate([prompt, tokens]))[len(prompt) - 1 : -1] / temperature
    top = found.max(-1, keepdims=True)
    every = found - top - np.log(np.exp(found - top).sum(-1, keepdims=True))
    return every[np.arange(len(tokens)), tokens]


def stock_gradient(model: Any, examples: list[Example], weights: Callable[[Any], Any]) -> dict[str, np.ndarray]:
    """Of the weighed sum of all log-probs, by LoRA tensor, in training mode."""
    flat: Any = tree_flatten(model.parameters())
    start = {name: x for name, x in flat if name.rsplit(".", 1)[-1] in ("lora_a", "lora_b")}
    total = {name: np.zeros(x.shape) for name, x in start.items()}
    model.train()
    try:
        for example, completion in ((e, c) for e in examples for c in e.completions):
            row = mx.array(np.concatenate([example.prompt, completion.tokens]))[None]
            targets = mx.array(completion.tokens)
            chosen = mx.where(mx.array(completion.mask), weights(targets), 0)
            at = slice(len(example.prompt) - 1, -1)

            def weighed(tensors: Any, row: mx.array = row, at: slice = at, y: mx.array = targets, w: mx.array = chosen):
                model.update(tree_unflatten(list(tensors.items())))
                found = model(row)[0, at].astype(mx.float32)
                found = found - mx.logsumexp(found, -1, keepdims=True)
                return (w * mx.take_along_axis(found, y[:, None], -1)[:, 0]).sum()

            with pristine():
                slopes = mx.grad(weighed)(start)
                mx.eval(slopes)
            total = {name: total[name] + np.array(slope.astype(mx.float32)) for name, slope in slopes.items()}
    finally:
        model.update(tree_unflatten(list(start.items())))
        model.eval()
    return total


class Hand:
    """Inside, `change` is done by hand to what block `index` of a stock model gives; `out` is what it gave."""

    def __init__(self, model: Any, index: int, change: Callable[[mx.array], mx.array]) -> None:
        self.block, self.change = model.layers[index], change
        self.base: type[nn.Module] = type(self.block)
        self.out: mx.array | None = None

    def __enter__(self) -> "Hand":
        def call(block: Any, *args: Any, **kwargs: Any) -> Any:
            given = self.base.__call__(block, *args, **kwargs)
            out, *rest = given if isinstance(given, tuple) else (given,)
            self.out, changed = out, self.change(out)
            return (changed, *rest) if isinstance(given, tuple) else changed

        self.block.__class__ = type(f"Patched{self.base.__name__}", (self.base,), {"__call__": call})
        return self

    def __exit__(self, *_: Any) -> None:
        self.block.__class__ = self.base


class Listened:
    """Inside, every block of a stock model reads `before(x)`; what it read and gave is kept."""

    def __init__(self, model: Any, before: Callable[[mx.array], mx.array]) -> None:
        self.blocks, self.before = list(model.layers), before
        self.kept: list[tuple[mx.array, mx.array]] = []

    def __enter__(self) -> "Listened":
        self.bases = [type(block) for block in self.blocks]
        for block, base in zip(self.blocks, self.bases, strict=True):
            block.__class__ = type(f"Heard{base.__name__}", (base,), {"__call__": self._call(base)})
        return self

    def _call(self, base: type) -> Callable[..., Any]:
        def call(block: Any, *args: Any, **kwargs: Any) -> Any:
            name = "" if args else next(iter(kwargs))
            read = self.before(args[0] if args else kwargs[name])
            args, kwargs = ((read, *args[1:]), kwargs) if args else ((), {**kwargs, name: read})
            given = base.__call__(block, *args, **kwargs)
            self.kept.append((read, given[0] if isinstance(given, tuple) else given))
            return given

        return call

    def __exit__(self, *_: Any) -> None:
        for block, base in zip(self.blocks, self.bases, strict=True):
            block.__class__ = base


# ------------------------------------------------------------------ rows


def examples() -> list[Example]:
    """Of SHAPES; long completions have an untrained token, their third."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(3, VOCAB_SIZE - 65, n).astype(np.int32)  # noqa: E731
    made = lambda n: Completion(draw(n), np.array([i != 2 or n < 4 for i in range(n)]))  # noqa: E731
    return [Example(draw(p), tuple(map(made, lengths)), 0, "", {}) for p, lengths in SHAPES]


def prompts(*lengths: int) -> list[np.ndarray]:
    """Random tokens."""
    rng = np.random.default_rng(3)
    return [rng.integers(3, VOCAB_SIZE - 65, n).astype(np.int32) for n in lengths]
