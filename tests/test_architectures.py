# SPDX-License-Identifier: Apache-2.0
"""Every architecture, from its folder through the whole loop to an adapter that gives mlx-lm the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import ARCHITECTURES

from mlx_realign.policy import Policy
from mlx_realign.train import train

PAIRS = [
    {"prompt": "Say it kindly.", "chosen": "With pleasure, dear friend.", "rejected": "No."},
    {"prompt": "And now?", "chosen": "Gladly, here it is.", "rejected": "Go away, I said."},
]
TURNS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("method", ["dpo", "sft"])
def test_trains_and_its_adapter_loads_in_mlx_lm(
    method: str, arch: str, model_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "cache"))
    folder, output = str(model_folder(arch)), tmp_path / "run"
    policy = Policy.load(folder)
    rows = PAIRS if method == "dpo" else TURNS
    options: dict[str, Any] = {"lora_rank": 4, "grad_checkpoint": True, "learning_rate": 1e-2, "steps": 4}
    train(policy, method=method, data=rows, output=str(output), lr_schedule="constant", batch_size=2, **options)
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) or method == "sft"
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    tokens = mx.array([[65, 66, 67, 68, 257, 10, 70, 80]])
    model = mlx_lm.load(folder, adapter_path=str(output))[0]
    np.testing.assert_allclose(model(tokens), policy.model(tokens), atol=1e-4)
    with policy.adapter_off():
        assert np.abs(np.array(model(tokens)) - np.array(policy.model(tokens))).max() > 0.01
