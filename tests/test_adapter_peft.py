# SPDX-License-Identifier: Apache-2.0
"""PEFT folders: read ones give the logits that torch PEFT gave, written ones give torch PEFT the logits we have."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from test_adapter_files import far, move

from mlx_realign import adapter, cli, export
from mlx_realign.adapter_peft import to_peft
from mlx_realign.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
import peft_cases  # noqa: E402  # pyright: ignore[reportMissingImports]

TOKENS = mx.array(peft_cases.TOKENS)


@pytest.mark.parametrize("case", peft_cases.CASES)
def test_a_peft_folder_gives_the_logits_of_torch_peft(tmp_path: Path, case: str):
    golden: Any = mx.load(str(GOLDEN / "peft.safetensors"))
    base = peft_cases.write_base(tmp_path / "base", case)
    model, _ = load_model(base)
    adapter.load(model, peft_cases.write_peft(tmp_path / "peft", case))
    assert far(model(TOKENS), golden[case]) < 1e-4
    adapter.save(model, tmp_path / "mlx", base_model=str(base))
    stock = load_adapters(load_model(base)[0], str(tmp_path / "mlx"))
    assert far(stock(TOKENS), golden[case]) < 1e-4


@pytest.mark.parametrize("case", ["plain", "rslora", "dora", "one_layer", "experts"])
def test_export_gives_back_the_peft_folder_that_was_read(tmp_path: Path, case: str):
    """`make_peft.py` computed this folder's logits with torch, so the same tensors and scale mean the same model."""
    model, _ = load_model(peft_cases.write_base(tmp_path / "base", case))
    file = adapter.load(model, peft_cases.write_peft(tmp_path / "peft", case))
    adapter.save(model, tmp_path / "mlx", base_model="base")
    to_peft(tmp_path / "mlx", tmp_path / "out", "base")
    before: Any = mx.load(str(tmp_path / "peft" / "adapter_model.safetensors"))
    after: Any = mx.load(str(tmp_path / "out" / "adapter_model.safetensors"))
    assert set(after) == set(before) and all(mx.array_equal(after[name], before[name]) for name in before)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(file.scale)
    assert not config["use_rslora"] and config["use_dora"] == (case == "dora")
    expected = {
        "one_layer": {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"},
        "experts": {"self_attn.q_proj", "gate_proj", "up_proj", "down_proj"},
    }
    if case in expected:
        assert set(config["target_modules"]) == expected[case]


def torch_python() -> str | None:
    """A Python with torch and PEFT: this one, or the one TORCH_PYTHON names."""
    if named := os.environ.get("TORCH_PYTHON"):
        return named
    return sys.executable if importlib.util.find_spec("torch") and importlib.util.find_spec("peft") else None


@pytest.mark.slow
@pytest.mark.skipif(
    torch_python() is None, reason="needs torch and peft, here or in the Python that TORCH_PYTHON names"
)
@pytest.mark.parametrize("case", [*peft_cases.CASES, "tied_embedding"])
def test_torch_peft_gives_the_logits_of_the_export(tmp_path: Path, case: str):
    base = peft_cases.write_base(tmp_path / "base", "plain" if case == "tied_embedding" else case)
    model, _ = load_model(base)
    if case == "tied_embedding":
        adapter.attach(model, rank=3, alpha=5, targets="embed_tokens,q_proj,down_proj", layers=1)
        move(model)
    else:
        adapter.load(model, peft_cases.write_peft(tmp_path / "peft", case))
    adapter.save(model, tmp_path / "mlx", base_model=str(base))
    assert cli.run(export.main, [str(tmp_path / "mlx"), "--to", "peft", "--output", str(tmp_path / "out")]) == 0
    paths = {"base": base, "adapter": tmp_path / "out", "output": tmp_path / "logits.safetensors"}
    flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    subprocess.run([torch_python() or "", str(GOLDEN / "make_peft.py"), *flags], check=True, capture_output=True)
    logits: Any = mx.load(str(paths["output"]))
    assert far(logits["logits"], model(TOKENS)) < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save, which mlx-lm's adapters cannot hold"),
        ({"bias": "all"}, "uses bias"),
        ({"lora_bias": True, "use_qalora": True}, "uses lora_bias, use_qalora"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is 'pissa_niter_4', which changed the base weights",
        ),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"r": None}, "r is None, expected a number"),
        ({"r": 0}, "r is 0, expected 1 or more"),
        ({"r": 8}, "layers.0.mlp.down_proj: rank 4, but adapter_config.json says 8"),
    ],
)
def test_a_peft_folder_that_cannot_be_held_is_refused(tmp_path: Path, change: dict[str, Any], message: str):
    model, _ = load_model(peft_cases.write_base(tmp_path / "base", "plain"))
    folder = peft_cases.write_peft(tmp_path / "peft", "plain")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        adapter.load(model, folder)
    assert not adapter.adapters_of(model)


def test_peft_tensors_that_do_not_fit_are_all_named(tmp_path: Path):
    model, _ = load_model(peft_cases.write_base(tmp_path / "base", "experts"))
    folder = peft_cases.write_peft(tmp_path / "peft", "experts")
    tensors: Any = mx.load(str(folder / "adapter_model.safetensors"))
    layer = "base_model.model.model.layers.0"
    del tensors[f"{layer}.self_attn.q_proj.lora_A.weight"]
    for name in ("A", "B"):
        tensors[f"{layer}.mlp.experts.9.up_proj.lora_{name}.weight"] = mx.zeros((4, 4))
        tensors[f"{layer}.mlp.nothing.lora_{name}.weight"] = mx.zeros((4, 4))
    tensors["base_model.model.score.weight"] = mx.zeros((2, 32))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    with pytest.raises(UserError) as caught:
        adapter.load(model, folder)
    for line in (
        "model.layers.0.self_attn.q_proj: lora_A is missing",
        "model.layers.0.mlp.experts.9.up_proj: the model has 4 experts of 32 to 24",
        "model.layers.0.mlp.nothing: the model has no such layer",
        "score: not a LoRA tensor",
    ):
        assert line in str(caught.value)


def test_peft_folders_with_adapted_embeddings(tmp_path: Path):
    """PEFT saves a copy of the embedding beside its pair; and where the head shares it, PEFT and mlx-lm part ways."""
    folder = peft_cases.write_peft(tmp_path / "peft", "embedding")
    weights = folder / "adapter_model.safetensors"
    tensors: Any = mx.load(str(weights))
    own = mx.array(peft_cases.model_of("embedding")[1]["model.embed_tokens.weight"])
    copy = "base_model.model.model.embed_tokens.base_layer.weight"
    base = peft_cases.write_base(tmp_path / "base", "embedding")
    mx.save_safetensors(str(weights), {**tensors, copy: own.astype(mx.bfloat16)})
    adapter.load(load_model(base)[0], folder)
    mx.save_safetensors(str(weights), {**tensors, copy: own + 0.5})
    with pytest.raises(UserError, match="embed_tokens: the base had another weight than the model has"):
        adapter.load(load_model(base)[0], folder)
    mx.save_safetensors(str(weights), {**tensors, copy: own[:-4]})
    with pytest.raises(UserError, match=r"embed_tokens: the base had a weight \(300, 32\), the model has \(304, 32\)"):
        adapter.load(load_model(base)[0], folder)
    alone = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}
    mx.save_safetensors(str(weights), alone)
    with pytest.raises(UserError, match="model.embed_tokens, which is also this model's head"):
        adapter.load(load_model(peft_cases.write_base(tmp_path / "tied", "plain"))[0], folder)
