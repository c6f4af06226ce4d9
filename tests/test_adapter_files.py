# SPDX-License-Identifier: Apache-2.0
"""Adapter folders: stock mlx-lm means by them what we mean; a broken one gets one message that names all of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters

from mlx_realign import adapter
from mlx_realign.errors import UserError

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6] * 4])


def move(model: nn.Module) -> None:
    """As if trained: every adapter tensor away from its start."""
    mx.random.seed(1)
    layer: Any  # of several classes, with m or without
    for layer in adapter.adapters_of(model).values():
        layer.lora_a = layer.lora_a + 0.05 * mx.random.normal(layer.lora_a.shape)
        layer.lora_b = layer.lora_b + 0.1 * mx.random.normal(layer.lora_b.shape)
        if "m" in layer:
            layer.m = layer.m * (1 + 0.1 * mx.random.normal(layer.m.shape))


def quantized(model: nn.Module, packed: bool) -> nn.Module:
    if packed:
        nn.quantize(model, 32, 4)
    return model


def load(folder: Path, adapter_path: Path | None = None) -> tuple[nn.Module, Any]:
    """What `mlx_lm.generate --model FOLDER --adapter-path ADAPTER` loads."""
    model, tokenizer, *_ = mlx_lm.load(str(folder), adapter_path=None if adapter_path is None else str(adapter_path))
    return model, tokenizer


def far(one: mx.array, other: mx.array) -> float:
    return float(mx.abs(one.astype(mx.float32) - other.astype(mx.float32)).max())


CASES: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "llama": ("llama", False, {}),
    "quantised llama": ("llama", True, {}),
    "dora": ("qwen2", False, {"dora": True}),
    "quantised dora": ("llama", True, {"dora": True}),
    "experts": ("qwen3_moe", False, {}),
    "quantised experts": ("qwen3_moe", True, {}),
    "last layer": ("llama", False, {"layers": 1, "rslora": True}),
    "hybrid, some names": ("lfm2", False, {"targets": "in_proj,self_attn.q_proj"}),
    "one whole path": ("llama", False, {"targets": "model.layers.0.mlp.up_proj"}),
    "embedding, tied head": ("llama", False, {"targets": "q_proj,embed_tokens"}),
    "embedding and head": ("olmoe", False, {"targets": "all-linear,embed_tokens,lm_head"}),
}


@pytest.mark.parametrize("case", CASES)
def test_stock_mlx_lm_and_we_read_what_was_saved(tiny_model: Callable[..., Any], tmp_path: Path, case: str):
    arch, packed, options = CASES[case]
    model = quantized(tiny_model(arch), packed)
    base = model(TOKENS)
    paths = adapter.attach(model, rank=4, alpha=6, **options)
    move(model)
    expected = model(TOKENS)
    assert far(expected, base) > 0.1
    adapter.save(model, tmp_path, base_model="base", extra={"stage": "test"})
    stock = load_adapters(quantized(tiny_model(arch), packed), str(tmp_path))
    assert far(stock(TOKENS), expected) < 1e-4
    assert {path for path, module in stock.named_modules() if "lora_a" in module} == set(paths)
    ours = quantized(tiny_model(arch), packed)
    file = adapter.load(ours, tmp_path)
    assert mx.array_equal(ours(TOKENS), expected)
    assert (file.config["model"], file.config["stage"], file.dora) == ("base", "test", "dora" in options)
    assert {name for name, _ in tree_flatten(ours.trainable_parameters())} == set(adapter.state(model))


def test_mlx_lm_load_with_adapter_path(model_folder: Callable[..., Path], tmp_path: Path):
    folder = model_folder("qwen3")
    model, _ = load(folder)
    adapter.attach(model, rank=4, alpha=8)
    move(model)
    adapter.save(model, tmp_path / "adapter", base_model=str(folder))
    stock, _ = load(folder, tmp_path / "adapter")
    assert far(stock(TOKENS), model(TOKENS)) < 1e-4
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapters.safetensors"]


def test_mlx_lms_own_folder_with_an_adapted_router(tiny_model: Callable[..., Any], tmp_path: Path):
    parameters = {"rank": 4, "scale": 1.5, "dropout": 0.1}
    theirs = tiny_model("qwen3_moe")
    theirs.freeze()
    linear_to_lora_layers(theirs, 1, parameters)  # without keys it takes every layer, the router too
    mx.random.seed(2)
    trained = {
        k: v + 0.1 * mx.random.normal(v.shape) for k, v in dict(tree_flatten(theirs.trainable_parameters())).items()
    }
    theirs.load_weights(list(trained.items()), strict=False)
    theirs.eval()
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), trained)
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ours = tiny_model("qwen3_moe")
    file = adapter.load(ours, tmp_path)
    assert far(ours(TOKENS), theirs(TOKENS)) < 1e-4
    assert {layer.dropout for layer in adapter.adapters_of(ours).values()} == {0.1} and file.scale == 1.5
    router = "model.layers.1.mlp.gate"
    assert f"{router}.lora_a" in adapter.state(ours)
    assert not any(name.startswith(router) for name, _ in tree_flatten(ours.trainable_parameters()))


def test_loading_into_an_attached_model_takes_values_and_scale(tiny_model: Callable[..., Any], tmp_path: Path):
    model = tiny_model("llama")
    adapter.attach(model, rank=4, alpha=20)
    move(model)
    adapter.save(model, tmp_path, base_model="base")
    other = tiny_model("llama")
    adapter.attach(other, rank=4, alpha=1, seed=3)
    adapter.set_enabled(other, False)
    adapter.load(other, tmp_path, dropout=0.25)
    assert mx.array_equal(other(TOKENS), model(TOKENS))
    assert {layer.dropout for layer in adapter.adapters_of(other).values()} == {0.25}
    fewer = tiny_model("llama")
    adapter.attach(fewer, rank=4, alpha=1, targets="q_proj")
    with pytest.raises(UserError, match=r"layers.0.mlp.down_proj.lora_a: no such layer to adapt in the model"):
        adapter.load(fewer, tmp_path)


@pytest.fixture
def saved(tiny_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A good adapter folder of the tiny llama."""
    model = tiny_model("llama")
    adapter.attach(model, rank=4, alpha=8, targets="q_proj,v_proj")
    move(model)
    adapter.save(model, tmp_path / "adapter", base_model="base")
    return tmp_path / "adapter"


def configure(folder: Path, **change: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))


def cut(folder: Path, size: int) -> None:
    weights = folder / "adapters.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda d: d.rename(d.parent / "elsewhere"), "no such adapter folder"),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), "adapter_config.json: missing"),
    "config cut short": (lambda d: (d / "adapter_config.json").write_text('{"model": '), "not valid JSON"),
    "config of another kind": (lambda d: (d / "adapter_config.json").write_text("[]"), "expected a JSON object"),
    "no rank": (lambda d: configure(d, lora_parameters={"scale": 2.0}), "lora_parameters lacks rank, dropout"),
    "no parameters": (lambda d: configure(d, lora_parameters=None), "lora_parameters lacks rank, scale, dropout"),
    "a word for a number": (
        lambda d: configure(d, lora_parameters={"rank": 4, "scale": "big", "dropout": 0}),
        "scale is 'big', expected a number",
    ),
    "full fine-tune": (lambda d: configure(d, fine_tune_type="full"), "fine_tune_type is 'full'.*give their folder as"),
    "no weights": (lambda d: (d / "adapters.safetensors").unlink(), "adapters.safetensors: missing"),
    "empty weights": (lambda d: cut(d, 0), "not a complete safetensors file"),
    "header cut short": (lambda d: cut(d, 50), "not a complete safetensors file"),
    "data cut short": (lambda d: cut(d, -10), "not a complete safetensors file .it has .* bytes, its header promises"),
    "another rank": (
        lambda d: configure(d, lora_parameters={"rank": 8, "scale": 2.0, "dropout": 0.0}),
        r"self_attn.q_proj.lora_a: shape \(64, 4\), expected \(64, 8\)",
    ),
    "another kind": (lambda d: configure(d, fine_tune_type="dora"), r"layers.0.self_attn.q_proj.m: missing"),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_folder_is_one_message(tiny_model: Callable[..., Any], saved: Path, damage: str):
    harm, message = BROKEN[damage]
    harm(saved)
    model = tiny_model("llama")
    with pytest.raises(UserError, match=message):
        adapter.load(model, saved)
    assert not adapter.adapters_of(model)  # nothing was put on


def test_every_wrong_tensor_is_named_once(tiny_model: Callable[..., Any], saved: Path):
    weights = saved / "adapters.safetensors"
    tensors: Any = mx.load(str(weights))
    layer = "model.layers.0.self_attn"
    tensors[f"{layer}.q_proj.lora_a"] = mx.zeros((3, 4))
    tensors[f"{layer}.v_proj.lora_b"] = mx.full((4, 32), float("nan"))
    tensors["model.layers.7.self_attn.q_proj.lora_a"] = mx.zeros((64, 4))
    tensors["model.layers.1.self_attn.q_proj.weight"] = mx.zeros((4, 4))
    tensors["stray"] = mx.zeros((1,))
    del tensors["model.layers.1.self_attn.v_proj.lora_a"]
    mx.save_safetensors(str(weights), tensors)
    with pytest.raises(UserError) as caught:
        adapter.load(tiny_model("llama"), saved)
    assert [line.strip() for line in str(caught.value).splitlines()[1:]] == [
        "stray: no such layer to adapt in the model",
        f"{layer}.q_proj.lora_a: shape (3, 4), expected (64, 4)",
        f"{layer}.v_proj.lora_b: holds something other than finite numbers",
        "model.layers.1.self_attn.q_proj.weight: not part of such an adapter",
        "model.layers.1.self_attn.v_proj.lora_a: missing",
        "model.layers.7.self_attn.q_proj.lora_a: no such layer to adapt in the model",
    ]
