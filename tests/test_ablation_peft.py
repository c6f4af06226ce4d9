# SPDX-License-Identifier: Apache-2.0
"""An ablation as a PEFT folder: exact by PEFT's own formula, and the same logits in torch."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from test_adapter_files import far
from test_adapter_peft import GOLDEN, TOKENS, torch_python

from mlx_realign import adapter, cli, directions, export, writers
from mlx_realign.ablation import edit
from mlx_realign.policy import Policy

R = directions.unit(np.random.default_rng(3).standard_normal(64))


def ablated(base: Path, folder: Path, dora: bool = False) -> Policy:
    """The model of a folder with R taken out of all its writers, its adapter saved and exported to folder/peft."""
    policy = Policy.load(str(base))
    edit.put_on(policy, edit.plan(writers.find(policy), R), dora=dora)
    adapter.save(policy.model, folder / "mlx", base_model=str(base))
    assert cli.run(export.main, [str(folder / "mlx"), "--to", "peft", "--output", str(folder / "peft")]) == 0
    return policy


def test_the_exported_folder_holds_the_projection_by_pefts_own_formula(
    tmp_path: Path, model_folder: Callable[..., Path]
):
    """W + lora_alpha / r * B A (PEFT's docs, LoRA) writes nothing along R, and is W in all other directions."""
    base = model_folder("llama")
    ablated(base, tmp_path)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"self_attn.o_proj", "mlp.down_proj"} and not config["use_dora"]
    tensors: Any = mx.load(str(tmp_path / "peft" / "adapter_model.safetensors"))
    weights: Any = mx.load(str(base / "model.safetensors"))
    paths = [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name
    ]
    assert len(paths) == 4
    for path in paths:
        a, b = (np.array(tensors[f"base_model.model.{path}.lora_{x}.weight"]).astype(np.float64) for x in "AB")
        before = np.array(weights[f"{path}.weight"].astype(mx.float32)).astype(np.float64)
        after = before + config["lora_alpha"] / config["r"] * b @ a
        assert np.linalg.norm(R @ after) < 1e-6 * np.linalg.norm(R @ before)
        beside = np.eye(64) - np.outer(R, R)
        np.testing.assert_allclose(beside @ after, beside @ before, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(
    torch_python() is None, reason="needs torch and peft, here or in the Python that TORCH_PYTHON names"
)
@pytest.mark.parametrize(("kind", "dora"), [("llama", False), ("llama", True), ("olmo2", False)])
def test_torch_peft_gives_the_logits_of_the_ablated_model(
    tmp_path: Path, model_folder: Callable[..., Path], kind: str, dora: bool
):
    base = model_folder(kind)
    policy = ablated(base, tmp_path, dora)
    paths = {"base": base, "adapter": tmp_path / "peft", "output": tmp_path / "logits.safetensors"}
    flags = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    subprocess.run([torch_python() or "", str(GOLDEN / "make_peft.py"), *flags], check=True, capture_output=True)
    logits: Any = mx.load(str(paths["output"]))
    assert far(logits["logits"], policy.model(TOKENS)) < 1e-4
