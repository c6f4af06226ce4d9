# SPDX-License-Identifier: Apache-2.0
"""What mlx-lm does on a GPU only, under a pretended one: right to 1e-4, no kernel without a gradient in training."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from grid_models import ARCHITECTURES

HERE = Path(__file__).parent
LIMIT = 3e-4  # the whole grid has 1e-4 at most; what rounds gradients of gated deltas is the processor's
WIDE = "linear_key_head_dim=128,linear_value_head_dim=128"
# Recurrences whose kernels have no gradient (by shape: MLX's own, chunks), states, experts, plain.
QUICK = {
    "qwen3_5": set(),  # narrower than mlx-lm's kernels
    "qwen3_next,linear_key_head_dim=64,linear_num_key_heads=2,linear_num_value_heads=4": {"gated_delta_step"},
    "kimi_k3": set(),
    "rwkv7": {"wkv7_kernel"},
    "mamba2": {"ssm_kernel"},
    "gpt_oss": set(),
}
SLOW = [
    f"qwen3_5,{WIDE},linear_num_key_heads=16,linear_num_value_heads=16",
    f"qwen3_next,{WIDE},linear_num_key_heads=16,linear_num_value_heads=32",
    *ARCHITECTURES,
]
# Where kernels or the device are asked for in mlx-lm, and what is done about it (docs/numerics.md, "On a GPU").
KNOWN = {
    "models/bailing_moe_v3.py", "models/bitlinear_layers.py", "models/deepseek_v41.py", "models/gated_delta.py",
    "models/kimi_k3.py", "models/kimi_linear.py", "models/olmo_hybrid.py", "models/qwen3_5.py", "models/qwen3_next.py",
    "models/rwkv7.py", "models/ssm.py", "tuner/losses.py", "generate.py", "server.py", "share.py", "utils.py",
    *(f"kernels/{name}.py" for name in "qk_norm expert_routing qk_norm_rope post_expert_norm_combine".split()),
    *(f"kernels/{name}.py" for name in "rms_norm_sigmoid_gate norm_add_norm".split()),
}  # fmt: skip


def pretended(*words: str) -> list[dict[str, Any]]:
    """Rows of tests/pretended_gpu.py."""
    command = [sys.executable, str(HERE / "pretended_gpu.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def hold(row: dict[str, Any]) -> None:
    for name, cell in row["cells"].items():
        assert "KernelHasNoGradient" not in str(cell), f"{row['arch']}, {name}: {cell}"
        assert isinstance(cell, float) and cell <= LIMIT or str(cell).startswith("refused: "), (row["arch"], name, cell)


def test_recurrences_experts_and_states_are_right_where_a_gpu_is_believed_in():
    rows = pretended(*QUICK)
    assert [row["arch"] for row in rows] == list(QUICK)
    for row in rows:
        hold(row)
        assert isinstance(row["cells"]["gradient"], float), row["cells"]["gradient"]
        assert row["scores"] == ["mlx.core.float32"]
        assert QUICK[row["arch"]] <= set(row["kernels"]), f"{row['arch']} met {row['kernels']}"


@pytest.mark.slow
@pytest.mark.parametrize("arch", SLOW)
def test_every_architecture_is_right_or_refused_where_a_gpu_is_believed_in(arch: str):
    (row,) = pretended(arch)
    hold(row)


def test_a_kernel_without_a_gradient_is_found():
    program = (
        "import sys; sys.path.insert(0, 'tests'); import pretended_gpu; pretended_gpu.begin()\n"
        "import mlx_realign.kernels as ours; ours._recurrent = lambda *_: None  # what exchanges the kernels\n"
        "raise SystemExit(pretended_gpu.main(['rwkv7']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=HERE.parent)
    assert "KernelHasNoGradient" in json.loads(done.stdout)["cells"]["gradient"]


def test_every_place_of_mlx_lm_that_asks_for_a_kernel_or_the_device_is_known():
    root = Path(mlx_lm.__file__).parent
    asking = re.compile(r"metal_kernel|cuda_kernel|metal\.is_available|default_device\(|device_info\(|use_kernel")
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if asking.search(path.read_text(encoding="utf-8")) and "examples" not in path.parts
    }
    assert found == KNOWN
