# SPDX-License-Identifier: Apache-2.0
"""What mlx-lm does on a GPU only, under a pretended one: right to 1e-4, no kernel without a gradient in training."""

import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
import pytest
from docs_tools import tables
from grid_models import ARCHITECTURES
from grid_table import GPU_PAGE, GPU_TABLE, gpu_row
from pretended_gpu_runs import RUNS

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
    "dbrx": set(),
}
SLOW = [
    f"qwen3_5,{WIDE},linear_num_key_heads=16,linear_num_value_heads=16",
    f"qwen3_next,{WIDE},linear_num_key_heads=16,linear_num_value_heads=32",
    *ARCHITECTURES,
]
SEEN = "qwen3_5,linear_key_head_dim=64,linear_num_key_heads=2,linear_num_value_heads=4"  # heads that kernels take
FEW = "sft dpo-checkpointed grpo ablate extract generate".split()
# In 4-bit bfloat16: plain, experts, gated delta, states; then the rest of them.
PACKED = ["llama", "qwen3_moe", "qwen3_5", "mamba2"]
PACKED_SLOW = """deepseek_v3 falcon_h1 gemma2 gemma3_text glm4_moe gpt_oss granite kimi_linear lfm2 ministral3 mixtral
olmo_hybrid olmoe phi3 qwen2 qwen3 qwen3_5_moe qwen3_next smollm3""".split()
# Where kernels or the device are asked for in mlx-lm, and what is done about it (docs/numerics.md, "On a GPU").
KNOWN = {
    "models/bailing_moe_v3.py", "models/bitlinear_layers.py", "models/deepseek_v41.py", "models/gated_delta.py",
    "models/kimi_k3.py", "models/kimi_linear.py", "models/olmo_hybrid.py", "models/qwen3_5.py", "models/qwen3_next.py",
    "models/rwkv7.py", "models/ssm.py", "tuner/losses.py", "generate.py", "server.py", "share.py", "utils.py",
    *(f"kernels/{name}.py" for name in "qk_norm expert_routing qk_norm_rope post_expert_norm_combine".split()),
    *(f"kernels/{name}.py" for name in "rms_norm_sigmoid_gate norm_add_norm".split()),
}  # fmt: skip


def pretended(
    *words: str, script: str = "pretended_gpu.py", sign: str = "", cache: Path | None = None
) -> list[dict[str, Any]]:
    """Rows that a script of this folder prints, each behind `sign`."""
    command = [sys.executable, str(HERE / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line.removeprefix(sign)) for line in done.stdout.splitlines() if line.startswith(sign)]


def hold(row: dict[str, Any]) -> None:
    assert row["traced"] is not False, f"{row['arch']} looks at its numbers"
    if row["arch"] in ARCHITECTURES:  # as the grid has it, no settings of its own
        said, found = gpu_rows()[row["arch"]], gpu_row(row)
        assert found == said, f"docs/numerics.md says {said} of {row['arch']}: python tests/grid_table.py --gpu"
    for name, cell in row["cells"].items():
        assert "KernelHasNoGradient" not in str(cell), f"{row['arch']}, {name}: {cell}"
        assert isinstance(cell, float) and cell <= LIMIT or str(cell).startswith("refused: "), (row["arch"], name, cell)


def beyond(pair: list[float]) -> bool:
    """Whether this project is further from float32 than mlx-lm's own rounding explains."""
    ours, stock = pair
    return not ours <= 2 * stock + 0.02


def hold_packed(row: dict[str, Any]) -> None:
    arch, rounded = row["arch"].partition(",")[0], row["bfloat16"]
    if arch == "gpt_oss":  # biases: its edited weights would have to be packed again
        assert "quantising the edited weights again" in row["cells"].pop("ablation")
    assert all(isinstance(cell, float) and cell <= LIMIT for cell in row["cells"].values()), row
    assert not any(isinstance(cell, str) or beyond(cell) for cell in rounded["cells"].values()), row
    assert {"states", "gradient", "rollout", "steering, generated"} < set(rounded["cells"])
    assert (rounded["way"], rounded["notes"]) == (row["way"], row["notes"]), "rounding made it give something up"
    assert rounded["traces"] == 4, "one for each shape"


def gpu_rows() -> dict[str, tuple[str, str]]:
    """(kernels met, traces) by model, as docs/numerics.md tells."""
    _, mark, rest = GPU_PAGE.read_text(encoding="utf-8").partition(GPU_TABLE)
    (rows,) = tables(rest.partition("<!-- end -->")[0])
    found = [(name, (row["kernels met"], row["traces"])) for row in rows for name in row["models"].split(", ")]
    assert mark and len(found) == len(dict(found)), "a model stands there twice"
    return {name.strip("`"): said for name, said in found}


def test_the_page_has_every_architecture_and_counts_them():
    rows = gpu_rows()
    assert set(rows) == set(ARCHITECTURES), "make the table again: python tests/grid_table.py --gpu"
    trains = [traces for _, traces in rows.values() if traces != "refused"]
    said = f"Of {len(rows)} models {len(trains)} train, {sum(traces != '0' for traces in trains)} of these by compiled"
    assert said in GPU_PAGE.read_text(encoding="utf-8") and "wrong" not in trains


def test_recurrences_experts_and_states_are_right_where_a_gpu_is_believed_in():
    rows = pretended(*QUICK, *(f"{arch},quantized=4" for arch in PACKED))
    assert len(rows) == len(QUICK) + len(PACKED)
    for row in rows[len(QUICK) :]:
        hold_packed(row)
    for row in rows[: len(QUICK)]:
        hold(row)
        assert isinstance(row["cells"]["gradient"], float), row["cells"]["gradient"]
        assert row["scores"] == ["mlx.core.float32"]
        assert QUICK[row["arch"]] <= set(row["kernels"]), f"{row['arch']} met {row['kernels']}"


def hold_runs(named: str, runs: Sequence[str]) -> Counter[str]:
    """The commands end well and teach something; kernels that they met."""
    rows = pretended(named, *runs, script="pretended_gpu_runs.py", sign="=> ")
    assert [(row["run"], row["code"], row["raised"]) for row in rows] == [(run, 0, "") for run in runs]
    trained = {row["run"]: row for row in rows if "losses" in row}
    assert set(trained) == {run for run in runs if run.partition("-")[0] in ("sft", "dpo", "grpo")}
    for run, row in trained.items():
        assert len(row["losses"]) == 2 and np.isfinite([*row["losses"], *row["norms"]]).all(), row
        assert min(row["norms"]) > 0 and row["moved"] > 1e-3, row
        assert not any("not compiled" in note for note in row["notes"]), row
        if plain := trained.get(run.removesuffix("-checkpointed")):
            assert row["losses"] == pytest.approx(plain["losses"], rel=1e-3, abs=1e-3)
        if run.startswith("dpo"):
            assert row["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    return sum((Counter(row["kernels"]) for row in rows), Counter())


def test_commands_train_ablate_and_steer_a_gated_delta_model_where_a_gpu_is_believed_in():
    """Compiled steps, also checkpointed; single tokens take mlx-lm's kernel, which has no gradient."""
    assert hold_runs(SEEN, FEW)["gated_delta_step"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", [SEEN, SLOW[0], "kimi_linear", "kimi_k3", "dbrx"])
def test_all_commands_do_so_with_several_models(arch: str):
    hold_runs(arch, RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SLOW)
def test_every_architecture_is_right_or_refused_where_a_gpu_is_believed_in(arch: str):
    (row,) = pretended(arch)
    hold(row)


# What the package does where a GPU is believed in and where not, then two faults: nothing exchanges the kernels without
# a gradient, and in bfloat16 none comes back through a packed matrix.
ODD = """
import json, sys, tempfile
from pathlib import Path
sys.path.insert(0, "tests")
import pretended_gpu
pretended_gpu.begin()
from grid_models import write_folder, write_packed
from mlx_realign import adapter_layers, kernels
folder = Path(tempfile.mkdtemp())
print(json.dumps(pretended_gpu.facts(write_packed(folder / "packed", "llama"))))
with pretended_gpu.off():
    print(json.dumps(pretended_gpu.facts(write_folder(folder / "plain", "llama"))))
kernels._recurrent, own = lambda *_: None, adapter_layers.matmul
pretended_gpu.main(["rwkv7"])
adapter_layers.matmul = lambda linear, dy: own(linear, dy) * (dy.dtype != pretended_gpu.mx.bfloat16)
pretended_gpu.main(["llama,quantized=4"])
"""


@pytest.fixture(scope="module")
def odd() -> list[dict[str, Any]]:
    """Rows of ODD: with a GPU, without, and of the two faults."""
    done = subprocess.run([sys.executable, "-c", ODD], capture_output=True, text=True, check=False, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("arch", PACKED_SLOW)
def test_every_family_in_four_bits_is_right_to_rounding(arch: str):
    (row,) = pretended(f"{arch},quantized=4")
    hold_packed(row)


def test_the_package_goes_the_way_of_a_gpu(odd: list[dict[str, Any]]):
    gpu, cpu = odd[:2]
    assert gpu["workers"] == 1 and gpu["compiled"] and not cpu["compiled"]
    assert gpu["kernels"] == [False, False] and cpu["kernels"] == [True, True], "attention and swiglu of a CPU"
    assert gpu["slices"] == [4096] and cpu["slices"] == [2048, 2048], "bytes of logits that are held: 64 MB, 2 MB"
    assert gpu["dtype"] == "mlx.core.bfloat16", "the model's own"


def test_a_kernel_without_a_gradient_is_found(odd: list[dict[str, Any]]):
    assert "KernelHasNoGradient" in odd[2]["cells"]["gradient"]


def test_a_gradient_lost_in_bfloat16_is_found(odd: list[dict[str, Any]]):
    assert all(cell <= LIMIT for cell in odd[3]["cells"].values())
    found = odd[3]["bfloat16"]
    assert found["notes"] and beyond(found["cells"]["gradient"]) and not beyond(found["cells"]["log-probs"])


def test_every_place_of_mlx_lm_that_asks_for_a_kernel_or_the_device_is_known():
    root = Path(mlx_lm.__file__).parent
    asking = re.compile(r"metal_kernel|cuda_kernel|metal\.is_available|default_device\(|device_info\(|use_kernel")
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if asking.search(path.read_text(encoding="utf-8")) and "examples" not in path.parts
    }
    assert found == KNOWN


def test_a_step_has_no_more_operations_than_mlx_lm_s_trainer_and_sharing_adds_six():
    """A layer, with the same adapters. Sharing gathers keys and values, joins them to own ones, scatters them back."""
    (found,) = pretended("llama", script="operations.py")
    stock, plain, shared = (Counter(found[name]) for name in ("mlx-lm", "plain", "shared"))
    assert sum(plain.values()) <= sum(stock.values())
    added = {name: shared[name] - 2 * plain[name] for name in ("Gather", "Scatter", "Concatenate")}
    assert added == {"Gather": 2, "Scatter": 2, "Concatenate": 2}
    other = {
        name: shared[name] - 2 * plain[name] for name in ("Matmul", "Copy", "Softmax", "Multiply", "AsType", "Exp")
    }
    assert max(other.values()) <= 0
