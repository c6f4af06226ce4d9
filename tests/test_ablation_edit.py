# SPDX-License-Identifier: Apache-2.0
"""Exactness: after an ablation nothing of r is left in what blocks add, on dense, 4-bit, expert, post-norm and hybrid
models; stock mlx-lm gives our logits; twice is once; off is the original.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters
from policy_tools import make_policy
from test_writers import GEMMA4, policy_of

from mlx_realign import adapter, capture, writers
from mlx_realign.ablation import edit
from mlx_realign.adapter_layers import base_of
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy

R = np.random.default_rng(3).standard_normal(64)
PROMPTS = [list(map(int, row)) for row in np.random.default_rng(4).integers(0, 320, (6, 12))]
TOKENS = mx.array(PROMPTS)
# Architecture, bits, limit of what may be left. 4-bit runs dequantised in no place: the adapter stands beside it.
CASES = {
    "llama": ("llama", None, 1e-5),
    "4-bit llama": ("llama", 4, 1e-4),
    "experts": ("qwen3_moe", None, 1e-5),
    "4-bit experts": ("qwen3_moe", 4, 1e-4),
    "gemma2": ("gemma2", None, 1e-5),
    "gemma3": ("gemma3_text", None, 1e-5),
    "olmo2": ("olmo2", None, 1e-5),
    "4-bit gemma3": ("gemma3_text", 4, 1e-4),
    "hybrid": ("lfm2", None, 1e-5),
    "4-bit hybrid": ("lfm2", 4, 1e-4),
    "state space": ("mamba2", None, 1e-5),
    "residual multiplier": ("granite", None, 1e-5),
}


def left(policy: Policy, rows: np.ndarray) -> float:
    """Norm of what blocks add along orthonormal rows [k, d], as a share of all they add: the largest over blocks."""
    states = capture.collect(policy, PROMPTS, positions=tuple(range(-12, 0))).astype(np.float64)
    added = np.diff(states, axis=1)  # [n, blocks, positions, d]
    norm = lambda x: np.sqrt((x**2).sum((0, 2, 3)))  # noqa: E731
    return float((norm(added @ rows.T) / norm(added)).max())


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def ablated(arch: str, bits: int | None = None, rows: np.ndarray = R, **options: Any) -> tuple[Policy, edit.Applied]:
    policy = policy_of(arch, bits)
    return policy, edit.put_on(policy, edit.plan(writers.find(policy), rows, **options))


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_left_of_r_in_what_blocks_add(case: str):
    arch, bits, limit = CASES[case]
    policy = policy_of(arch, bits)
    assert left(policy, unit(R)[None]) > 0.03  # there was something to remove
    applied = edit.put_on(policy, edit.plan(writers.find(policy), R))
    assert left(policy, unit(R)[None]) < limit
    assert max(edit.leaks(applied, TOKENS).values()) < limit
    assert max(edit.left_in_blocks(policy, R, TOKENS).values()) < limit


def test_experts_and_mlp_behind_two_norms_each_lose_r_as_well():
    policy = policy_of("gemma4_text", **GEMMA4)
    applied = edit.put_on(policy, edit.plan(writers.find(policy), R))
    assert len(applied.edits) == 8
    assert max(edit.left_in_blocks(policy, R, TOKENS).values()) < 1e-5


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "olmo2"])
def test_a_subspace_goes_as_one_direction_does(arch: str):
    rows = np.linalg.qr(np.random.default_rng(5).standard_normal((64, 3)))[0].T
    policy, _ = ablated(arch, rows=rows)
    assert left(policy, rows) < 1e-5


@pytest.mark.parametrize("arch", ["gemma2", "gemma3_text", "olmo2"])
def test_without_the_gains_much_would_be_left_behind_norms(arch: str):
    policy = policy_of(arch)
    bare = [edit.Edit(writer, unit(R)[None]) for writer in writers.find(policy)]
    edit.put_on(policy, bare)
    assert left(policy, unit(R)[None]) > 0.01


@pytest.mark.parametrize("case", ["llama", "4-bit llama", "4-bit experts", "gemma2", "hybrid"])
def test_stock_mlx_lm_gives_the_same_logits(case: str, tmp_path: Path):
    arch, bits, _ = CASES[case]
    policy, _ = ablated(arch, bits)
    adapter.save(policy.model, tmp_path, base_model="base")
    stock: Any = load_adapters(policy_of(arch, bits).model, str(tmp_path))
    stock.eval()
    assert mx.abs(stock(TOKENS) - policy.model(TOKENS)).max().item() < 1e-4  # type: ignore[operator]
    assert mx.abs(policy_of(arch, bits).model(TOKENS) - policy.model(TOKENS)).max().item() > 1e-2  # type: ignore[operator]


@pytest.mark.parametrize("case", ["llama", "4-bit llama", "experts", "olmo2"])
def test_twice_is_once(case: str):
    arch, bits, limit = CASES[case]
    policy, _ = ablated(arch, bits)
    once = policy.model(TOKENS)
    edit.put_on(policy, edit.plan(writers.find(policy), R))
    assert adapter.rank_of(next(iter(adapter.adapters_of(policy.model).values()))) == 2
    assert mx.abs(policy.model(TOKENS) - once).max().item() < 10 * limit  # type: ignore[operator]
    assert left(policy, unit(R)[None]) < limit


@pytest.mark.parametrize(
    ("case", "dora"),
    [
        ("4-bit experts", False),
        *((case, dora) for case in ("llama", "4-bit llama", "gemma2") for dora in (False, True)),
    ],
)
def test_off_is_the_original_bit_for_bit(case: str, dora: bool):
    arch, bits, _ = CASES[case]
    policy = policy_of(arch, bits)
    before = policy.model(TOKENS)
    tensors = {name: np.array(value) for name, value in flat(policy)}
    applied = edit.put_on(policy, edit.plan(writers.find(policy), R), dora=dora)
    assert not mx.array_equal(policy.model(TOKENS), before)
    with policy.adapter_off():
        assert mx.array_equal(policy.model(TOKENS), before)
    with applied.off():
        assert mx.allclose(policy.model(TOKENS), before, atol=1e-4)
    now = {name.replace(".linear.", "."): np.array(value) for name, value in flat(policy)}
    assert all(np.array_equal(now[name], value) for name, value in tensors.items())  # no weight was touched


def flat(policy: Policy) -> Any:
    return tree_flatten(policy.model.parameters())


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_a_weight_of_0_is_the_base_bit_for_bit(arch: str):
    before = policy_of(arch).model(TOKENS)
    policy, _ = ablated(arch, weight=0.0)
    assert mx.array_equal(policy.model(TOKENS), before)


def test_a_weight_is_a_share_and_can_differ_by_writer():
    weights = {"attention": 0.25, "mlp": 1.5}
    policy, applied = ablated("llama", weight=lambda writer: weights[writer.kind])
    layers = adapter.adapters_of(policy.model)
    for one in applied.edits:
        layer: Any = layers[one.writer.path]
        base = np.array(base_of(layer).weight).astype(np.float64)
        whole = base + (np.array(layer.lora_a).astype(np.float64) @ np.array(layer.lora_b)).T
        np.testing.assert_allclose(unit(R) @ whole, (1 - one.weight) * (unit(R) @ base), atol=1e-6)
        others = np.linalg.qr(np.stack([R, *np.eye(64)[:5]]).T)[0].T[1:]  # at right angles to r: untouched
        np.testing.assert_allclose(others @ whole, others @ base, atol=1e-6)
    shares = edit.leaks(applied, TOKENS)
    assert shares["model.layers.0.self_attn.o_proj"] == pytest.approx(0.75, abs=1e-5)  # nothing before it has changed


def test_each_block_can_lose_a_direction_of_its_own():
    rows = {0: R, 1: np.roll(R, 7)}
    policy, _ = ablated("llama", rows=rows)  # type: ignore[arg-type]
    states = capture.collect(policy, PROMPTS, positions=(-1, -2, -3)).astype(np.float64)
    added = np.diff(states, axis=1)
    for block, row in rows.items():
        assert np.abs(added[:, block] @ unit(row)).max() < 1e-5
        assert np.abs(added[:, 1 - block] @ unit(row)).max() > 1e-2


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
def test_an_adapter_that_was_there_stays_and_loses_r_too(arch: str):
    policy = make_policy(arch, rank=4)  # on all linear layers, its start moved
    moved = policy.model(TOKENS)
    applied = edit.put_on(policy, edit.plan(writers.find(policy), R))
    assert left(policy, unit(R)[None]) < 1e-5
    with applied.off():
        assert mx.allclose(policy.model(TOKENS), moved, atol=1e-4)  # it, and not the base
    # Elsewhere than along r it is W + s B A still.
    other = make_policy(arch, rank=4)
    for one in applied.edits:
        ours, theirs = (dense(model, one.writer.path) for model in (policy, other))
        np.testing.assert_allclose(ours, theirs - np.outer(unit(R), unit(R)) @ theirs, atol=1e-5)


def dense(policy: Policy, path: str) -> np.ndarray:
    """W + s B A, float64 [..., out, in]."""
    layer: Any = adapter.adapters_of(policy.model)[path]
    a, b = (np.array(x).astype(np.float64) for x in (layer.lora_a, layer.lora_b))
    low = b @ a if a.ndim == 3 else (a @ b).T
    return np.array(base_of(layer).weight).astype(np.float64) + layer.scale * low


def test_dora_is_refused_where_it_would_be_wrong():
    policy = make_policy("llama", dora=True)
    with pytest.raises(UserError, match="--adapter: is a DoRA adapter"):
        edit.put_on(policy, edit.plan(writers.find(policy), R))
    policy = make_policy("llama")
    with pytest.raises(UserError, match="--variant row-norm keeps the norms of the base"):
        edit.put_on(policy, edit.plan(writers.find(policy), R), dora=True)
    policy = policy_of("qwen3_moe")
    with pytest.raises(UserError, match="DoRA has no form for experts"):
        edit.put_on(policy, edit.plan(writers.find(policy), R), dora=True)


def test_a_bias_stays_under_an_adapter_and_is_told():
    policy = policy_of("gpt_oss")
    for writer in writers.find(policy):
        layer = writers.module_at(policy.model, writer.path)
        layer.bias = mx.broadcast_to(mx.array(0.1 * unit(R).astype(np.float32)), layer.bias.shape)  # along r, all of it
    applied = edit.put_on(policy, edit.plan(writers.find(policy), R))
    told = edit.bias_left(policy, applied.edits)
    assert len(told) == 4 and all(share == pytest.approx(1.0, abs=1e-5) for share in told.values())
    assert min(edit.leaks(applied, TOKENS).values()) > 1e-3  # what is measured says it too


def test_weights_are_read_as_they_are_used():
    """B W of packed weights by our pieces is B W of mlx's own dequantised matrix."""
    policy = policy_of("llama", 4)
    layer = writers.module_at(policy.model, "model.layers.0.mlp.down_proj")
    whole = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=32, bits=4)
    expected = unit(R) @ np.array(whole).astype(np.float64)
    np.testing.assert_allclose(edit.components(layer, unit(R)[None])[0], expected, rtol=1e-6)
