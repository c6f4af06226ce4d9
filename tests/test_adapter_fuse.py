# SPDX-License-Identifier: Apache-2.0
"""Fused models: the adapted model's logits without an adapter, and the rounding that this costs, as measured."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from test_adapter_files import CASES, TOKENS, far, load, move

from mlx_realign import adapter, cli, export
from mlx_realign.adapter_fuse import fuse


@pytest.mark.parametrize("case", ["llama", "dora", "experts", "embedding, tied head", "embedding and head"])
def test_a_fused_folder_is_the_adapted_model(
    model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
):
    arch, _, options = CASES[case]
    folder = model_folder(arch)
    model, _ = load_model(folder)
    adapter.attach(model, rank=4, alpha=6, **options)
    move(model)
    adapter.save(model, tmp_path / "adapter", base_model=str(folder))
    argv = [str(tmp_path / "adapter"), "--to", "fused", "--output", str(tmp_path / "fused")]
    assert cli.run(export.main, argv) == 0
    assert "of the adapter, largest difference of a log-prob" in capsys.readouterr().out
    fused, tokenizer = load(tmp_path / "fused")
    assert far(fused(TOKENS), model(TOKENS)) < 1e-4
    assert tokenizer.encode("abc") == load(folder)[1].encode("abc")
    assert not any("lora" in name for name, _ in tree_flatten(fused.parameters()))
    assert cli.run(export.main, argv) == 2  # the folder has files now
    assert "is not an empty folder" in capsys.readouterr().err


def test_a_quantised_base_is_fused_only_when_told_how(
    model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = model_folder("llama")
    model, config = load_model(source)
    model, config = mlx_lm.utils.quantize_model(model, config, 32, 4)
    mlx_lm.utils.save_model(tmp_path / "base", model)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    for file in source.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "base")
    adapter.attach(model, rank=4, alpha=8)
    for layer in adapter.adapters_of(model).values():
        layer.lora_b = layer.lora_b + 0.002 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(0))
    adapter.save(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    argv = [str(tmp_path / "adapter"), "--to", "fused", "--output"]
    assert cli.run(export.main, [*argv, str(tmp_path / "refused")]) == 2
    message = capsys.readouterr().err
    assert "is quantised" in message and "--dequantize" in message and not (tmp_path / "refused").exists()
    share = float(message.split(" would move the weights by ")[1].split("%")[0])
    assert share > 100  # an adapter this small is lost in 4 bits
    assert cli.run(export.main, [*argv, str(tmp_path / "floats"), "--dequantize"]) == 0
    floats, config = load_model(tmp_path / "floats")
    assert "quantization" not in config and far(floats(TOKENS), model(TOKENS)) < 1e-4
    assert cli.run(export.main, [*argv, str(tmp_path / "forced"), "--force"]) == 0
    forced, _ = load_model(tmp_path / "forced")
    layer = "model.layers.0.mlp.up_proj"
    before, after = dict(model.named_modules())[layer], dict(forced.named_modules())[layer]
    assert isinstance(after, nn.QuantizedLinear) and after.bits == before.linear.bits
    assert far(forced(TOKENS), model(TOKENS)) > 100 * far(floats(TOKENS), model(TOKENS))


def test_rounding_to_bfloat16_is_measured(tiny_model: Callable[..., Any], tmp_path: Path):
    model = tiny_model("llama")
    model.set_dtype(mx.bfloat16)
    adapter.attach(model, rank=4, alpha=8)
    move(model)
    delta = stored = 0.0
    before = {path: layer["linear"].weight for path, layer in adapter.adapters_of(model).items()}
    layers = adapter.adapters_of(model)
    rounding = fuse(model)
    for path, module in model.named_modules():
        if path in before:
            own = 2.0 * (layers[path].lora_a @ layers[path].lora_b).T
            delta += float(own.square().sum())
            exact = before[path].astype(mx.float32) + own
            stored += float((module["weight"].astype(mx.float32) - exact).square().sum())
    assert rounding == pytest.approx((stored / delta) ** 0.5, rel=1e-4) and 1e-4 < rounding < 0.1
    assert not adapter.adapters_of(model)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "--to", "peft", "--output", "out"], "nowhere: no such adapter folder"),
        (["nowhere", "--to", "gguf", "--output", "out"], "--to: expected one of peft, fused"),
        (["nowhere", "--output", "out"], "needs --to"),
    ],
)
def test_wrong_commands_exit_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    assert cli.run(export.main, argv) == 2
    assert message in capsys.readouterr().err
