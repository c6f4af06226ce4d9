# SPDX-License-Identifier: Apache-2.0
"""Where a GPU rounds what it multiplies to 10 bits, what is right passes the package's checks and what is wrong fails.

Rounding is simulated (tests/tf32.py) under a pretended M5.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tf32
from kernel_tools import normal

from mlx_realign import noise, selfcheck, ways

HERE = Path(__file__).parent
# One of each kind; gemma3_text and qwen3_5 are the two that rounding moves most.
SLOW = "qwen3 mixtral gpt_oss qwen3_moe mamba2 rwkv7 falcon_h1 olmo2 phi3 gpt2 cohere2 granitemoehybrid gemma2".split()
ROOM = 2.5  # what rounding comes to at most, times this, is the limit


def rows(*architectures: str) -> list[dict[str, Any]]:
    """Rows of tests/tf32.py."""
    command = [sys.executable, str(HERE / "tf32.py"), *architectures]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def hold(row: dict[str, Any]) -> None:
    for way in ("alike", "apart"):
        found, arch = row[way], row["arch"]
        assert not [note for note in found["notes"] if "differ" in note], (arch, way, found["notes"])
        assert ROOM * found["self-check"] <= selfcheck.LIMIT[mx.float16], (arch, way, found["self-check"])
        assert ROOM * found["ways"] <= ways.LIMIT[mx.float16], (arch, way, found["ways"])
        assert "differ" not in str(found["way"]), (arch, way, found["way"])
    assert all(row["faults"].values()), (row["arch"], row["faults"])


def test_checks_pass_what_rounding_does_and_find_what_is_wrong():
    found = rows("gemma3_text", "qwen3_5")
    for row in found:
        hold(row)
        assert "chunked_head" in row["faults"]
        assert row["apart"]["self-check"] > 2 * selfcheck.LIMIT[mx.float32]  # which would have stopped the run


@pytest.mark.slow
@pytest.mark.parametrize("arch", SLOW)
def test_checks_of_more_architectures(arch: str):
    hold(*rows(arch))


@pytest.mark.parametrize(
    ("kind", "architecture", "setting", "expected"),
    [
        (mx.gpu, "applegpu_g17s", None, True),  # M5
        (mx.gpu, "applegpu_g17s", "1", True),
        (mx.gpu, "applegpu_g17s", "0", False),
        (mx.gpu, "applegpu_g16s", None, False),  # M4
        (mx.gpu, "applegpu_g13g", None, False),  # M1
        (mx.gpu, "sm_90", None, True),  # NVIDIA
        (mx.gpu, None, None, True),
        (mx.cpu, "applegpu_g17s", None, False),
    ],
)
def test_who_rounds(
    kind: Any, architecture: str | None, setting: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("MLX_ENABLE_TF32")
    if setting:
        monkeypatch.setenv("MLX_ENABLE_TF32", setting)
    device = mx.Device(kind)
    monkeypatch.setattr(mx, "default_device", lambda: device)
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": architecture} if architecture else {})
    assert noise.short_products() == expected
    assert noise.judged_as(mx.float32) == (mx.float16 if expected else mx.float32)
    assert noise.judged_as(mx.bfloat16) == mx.bfloat16
    assert noise.tolerance(np.array([1.1, 0.3], np.float32)) == (2.0**-10 if expected else noise.FLOAT32)


def test_the_simulation_rounds_as_a_gpu_does():
    """Numbers by hand, and a product of 512 x 512 as far off as one on an M5 (7.7e-4 instead of 2.9e-7)."""
    x = mx.array([1 + 2.0**-10, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-12, 3e38, -mx.inf, 0.0])
    step = 2.0**-10
    assert (
        tf32.rounded(x)[:4].tolist() == [1 + step, 1, 1 + 2 * step, -1]
        and tf32.rounded(x)[5:].tolist() == x[5:].tolist()
    )
    a, b = normal(512, 512), normal(512, 512, seed=1)
    right = np.array(a).astype(np.float64) @ np.array(b).astype(np.float64)
    off = lambda y: float(np.linalg.norm(np.array(y) - right) / np.linalg.norm(right))  # noqa: E731
    with tf32.simulated():
        found = a @ b
        slope = mx.grad(lambda a: (a @ b).sum())(a)
    assert 1e-4 < off(found) < 1e-3 and off(a @ b) < 1e-6
    gap = float(mx.abs(slope - mx.ones((512, 512)) @ b.T).max())
    assert 1e-4 < gap < 5e-2
