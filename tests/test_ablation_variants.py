# SPDX-License-Identifier: Apache-2.0
"""Variants that keep norms or means, in weights and as adapters: what they keep, leave of r and miss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters
from test_ablation_edit import PROMPTS, TOKENS, R, ablated, dense, left, unit
from test_writers import policy_of

from mlx_realign import adapter, writers
from mlx_realign.ablation import delivery, edit, variants
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((16, 24)).astype(np.float32)
ONE = edit.Edit(writers.Writer("x", 0, "mlp", None), unit(RNG.standard_normal(16))[None])


def norms(weight: np.ndarray, axis: int) -> np.ndarray:
    return np.sqrt((weight.astype(np.float64) ** 2).sum(axis))


def test_row_norms_stay_and_some_of_the_direction_comes_back():
    found = variants.rewritten("row-norm", WEIGHT, ONE)
    np.testing.assert_allclose(norms(found, 1), norms(WEIGHT, 1), rtol=1e-5)
    r = ONE.directions[0]
    bare = WEIGHT - np.outer(r, r @ WEIGHT)
    by_hand = bare * (norms(WEIGHT, 1) / norms(bare, 1))[:, None]
    np.testing.assert_allclose(found, by_hand, rtol=1e-4, atol=1e-6)
    assert np.linalg.norm(r @ found) > 0.01 * np.linalg.norm(r @ WEIGHT)  # the price, which leaks() tells


def test_column_norms_stay_and_nothing_of_the_direction_does():
    found = variants.rewritten("column-norm", WEIGHT, ONE)
    np.testing.assert_allclose(norms(found, 0), norms(WEIGHT, 0), rtol=1e-5)
    assert np.linalg.norm(ONE.directions[0] @ found) < 1e-6 * np.linalg.norm(ONE.directions[0] @ WEIGHT)


@pytest.mark.parametrize("variant", ["row-norm", "column-norm"])
def test_a_weight_scales_the_variants_too(variant: str):
    """Of an implementation that renormalised twice, any scale gave the whole ablation."""
    untouched = variants.rewritten(variant, WEIGHT, edit.Edit(ONE.writer, ONE.directions, 0.0))
    np.testing.assert_allclose(untouched, WEIGHT, rtol=1e-6)
    shares = []
    for weight in (0.25, 0.5, 0.75):
        found = variants.rewritten(variant, WEIGHT, edit.Edit(ONE.writer, ONE.directions, weight))
        shares.append(np.linalg.norm(ONE.directions[0] @ found) / np.linalg.norm(ONE.directions[0] @ WEIGHT))
    assert 0.7 < shares[0] < 0.95 and 0.45 < shares[1] < 0.7 and shares[2] < 0.45


@pytest.mark.parametrize("bits", [None, 4])
def test_row_norms_are_exactly_what_a_dora_adapter_holds(bits: int | None, tmp_path: Path):
    policy = policy_of("llama", bits)
    before = {w.path: edit.rows_of(writers.module_at(policy.model, w.path)) for w in writers.find(policy)}
    applied = edit.put_on(policy, edit.plan(writers.find(policy), R), dora=True)
    rng = np.random.default_rng(1)
    for one in applied.edits:
        layer, weight = adapter.adapters_of(policy.model)[one.writer.path], before[one.writer.path]
        x = rng.standard_normal((5, weight.shape[1])).astype(np.float32)
        expected = x @ variants.rewritten("row-norm", weight, one).T
        np.testing.assert_allclose(np.array(layer(mx.array(x))), expected, atol=2e-4)
    assert 1e-3 < max(edit.leaks(applied, TOKENS).values()) < 1  # some comes back, and is told
    adapter.save(policy.model, tmp_path, base_model="base")
    stock: Any = load_adapters(policy_of("llama", bits).model, str(tmp_path))
    stock.eval()
    assert mx.abs(stock(TOKENS) - policy.model(TOKENS)).max().item() < 2e-4  # type: ignore[operator]


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("variant", ["row-norm", "column-norm"])
def test_full_rank_variants_as_an_adapter_miss_what_is_told(arch: str, variant: str):
    policy = policy_of(arch)
    edits = edit.plan(writers.find(policy), R)
    weights = {e.writer.path: edit.rows_of(writers.module_at(policy.model, e.writer.path)) for e in edits}
    more, errors = variants.remainder(policy, edits, variant, rank=8)
    edit.put_on(policy, edits, more=more)
    for one in edits:
        weight, found = weights[one.writer.path], dense(policy, one.writer.path)
        exact = variants.rewritten(variant, weight, one)
        miss = np.linalg.norm(found - exact) / np.linalg.norm(exact - weight)
        assert errors[one.writer.path] == pytest.approx(miss, rel=1e-3)
        rest = (exact - variants.rewritten("plain", weight, one)).astype(np.float64)
        values = np.linalg.svd(rest, compute_uv=False)
        least = np.sqrt((values[..., 8:] ** 2).sum()) / np.linalg.norm(exact - weight)
        assert miss < 1.02 * least + 1e-6  # nothing of rank 8 comes nearer, but for the random start
    if variant == "column-norm":
        assert left(policy, unit(R)[None]) < 1e-5  # what is missed are the norms, not the direction


@pytest.mark.parametrize("variant", ["row-norm", "column-norm"])
def test_beside_an_adapter_norms_are_those_of_the_sum(variant: str):
    policy = policy_of("llama")
    adapter.attach(policy.model, rank=4, alpha=8.0)
    noise = lambda i, v: v + 0.2 * mx.random.normal(v.shape, key=mx.random.key(i))  # noqa: E731
    state = adapter.state(policy.model)
    policy.model.load_weights([(k, noise(i, v)) for i, (k, v) in enumerate(state.items())], strict=False)
    edits = edit.plan(writers.find(policy), R)
    before = {e.writer.path: dense(policy, e.writer.path) for e in edits}
    more, errors = variants.remainder(policy, edits, variant, rank=16)
    edit.put_on(policy, edits, more=more)
    for one in edits:
        weight, found = before[one.writer.path], dense(policy, one.writer.path)
        bare = weight - np.outer(unit(R), unit(R) @ weight)
        axis = 1 if variant == "row-norm" else 0
        exact = bare * np.expand_dims(norms(weight, axis) / norms(bare, axis), axis)
        miss = np.linalg.norm(found - exact) / np.linalg.norm(exact - weight)
        assert errors[one.writer.path] == pytest.approx(miss, rel=1e-3)


def test_a_whole_rank_misses_nothing():
    policy = policy_of("llama")
    _, errors = variants.remainder(policy, edit.plan(writers.find(policy), R), "column-norm", rank=64)
    assert max(errors.values()) < 1e-4


# ------------------------------------------------------------------ in the weights


def saved(policy: Policy, folder: Path, edits: list[edit.Edit], output: Path, **options: Any) -> variants.Stored:
    return variants.save_fused(folder, output, edits, options.pop("variant", "plain"), **options)


@pytest.mark.parametrize("variant", ["plain", "row-norm", "column-norm"])
@pytest.mark.parametrize("arch", ["llama", "qwen3_moe", "gemma3_text"])
def test_a_fused_folder_is_the_edited_model(arch: str, variant: str, model_folder: Callable[..., Path], tmp_path: Path):
    folder = model_folder(arch)
    policy = Policy.load(str(folder))
    before = policy.model(TOKENS)
    applied = variants.rewrite(policy, edit.plan(writers.find(policy), R), variant)
    stored = saved(policy, folder, applied.edits, tmp_path / "out", variant=variant)
    model, *_ = mlx_lm.load(str(tmp_path / "out"))
    assert mx.abs(model(TOKENS) - policy.model(TOKENS)).max().item() < 1e-4  # type: ignore[operator]
    assert mx.abs(policy.model(TOKENS) - before).max().item() > 1e-2  # type: ignore[operator]
    assert stored.rounding < 1e-5
    if variant != "row-norm":
        assert max(stored.left.values()) < 1e-5 and left(policy, unit(R)[None]) < 1e-5
    with applied.off():
        assert mx.array_equal(policy.model(TOKENS), before)


def test_biases_lose_the_direction_when_fused():
    policy = policy_of("gpt_oss")
    applied = variants.rewrite(policy, edit.plan(writers.find(policy), R), "plain")
    assert left(policy, unit(R)[None]) < 1e-5 and max(edit.leaks(applied, TOKENS).values()) < 1e-5
    with applied.off():
        assert left(policy, unit(R)[None]) > 1e-2


def test_affine_sets_the_component_to_its_mean_over_the_negatives(model_folder: Callable[..., Path], tmp_path: Path):
    folder = model_folder("llama")
    policy = Policy.load(str(folder))
    edits = edit.plan(writers.find(policy), R)
    means = variants.means_of(policy, edits, PROMPTS)
    heard = outputs(policy, edits, PROMPTS)
    for one in edits:  # the mean by hand, over the last tokens
        expected = np.mean([heard[one.writer.path][i][-1] @ unit(R) for i in range(len(PROMPTS))])
        assert means[one.writer.path][0] == pytest.approx(expected, abs=1e-4)
    variants.rewrite(policy, edits, "affine", means)
    for path, texts in outputs(policy, edits, PROMPTS).items():
        along = np.concatenate(texts) @ unit(R)
        np.testing.assert_allclose(along, means[path][0], atol=1e-4)  # at every token
    saved(policy, folder, edits, tmp_path / "out", variant="affine", means=means)
    model, *_ = mlx_lm.load(str(tmp_path / "out"))  # llama's mlx-lm code has biases to switch on
    assert mx.abs(model(TOKENS) - policy.model(TOKENS)).max().item() < 1e-4  # type: ignore[operator]


def test_affine_is_refused_where_the_architecture_has_no_bias(model_folder: Callable[..., Path], tmp_path: Path):
    folder = model_folder("qwen3")
    policy = Policy.load(str(folder))
    edits = edit.plan(writers.find(policy), R)
    with pytest.raises(UserError, match="needs a bias in .*o_proj, and mlx-lm's qwen3 has none"):
        saved(
            policy, folder, edits, tmp_path / "out", variant="affine", means=variants.means_of(policy, edits, PROMPTS)
        )
    assert not (tmp_path / "out").exists()


def outputs(policy: Policy, edits: list[edit.Edit], prompts: list[list[int]]) -> dict[str, list[np.ndarray]]:
    """What each writer gives, float64 [T, d] by prompt, heard by swapping its class here."""
    said: dict[str, list[np.ndarray]] = {one.writer.path: [] for one in edits}
    modules = {path: writers.module_at(policy.model, path) for path in said}
    kinds = {path: type(module) for path, module in modules.items()}

    def listening(path: str) -> type:
        def call(self: Any, x: mx.array) -> mx.array:
            y = kinds[path].__call__(self, x)
            said[path].append(np.array(y)[0].astype(np.float64))
            return y

        return type("Listening", (kinds[path],), {"__call__": call})

    for path, module in modules.items():
        module.__class__ = listening(path)
    for prompt in prompts:
        policy.model(mx.array([prompt]))
    for path, module in modules.items():
        module.__class__ = kinds[path]
    return said


def test_quantised_weights_are_fused_only_when_told_and_the_loss_is_said(
    model_folder: Callable[..., Path], tmp_path: Path
):
    source = model_folder("llama")
    mlx_lm.convert(str(source), mlx_path=str(tmp_path / "q4"), quantize=True, q_bits=4, q_group_size=32)
    policy = Policy.load(str(tmp_path / "q4"), cpu_dequantize="never")
    edits = edit.plan(writers.find(policy), R)
    with pytest.raises(UserError, match=r"move them by \d+% of what the edit does and put (\d+\.\d)% of the direction"):
        saved(policy, tmp_path / "q4", edits, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    forced = saved(policy, tmp_path / "q4", edits, tmp_path / "forced", force=True)
    assert 0.01 < np.mean(list(forced.left.values())) < 0.5  # requantising puts r back
    assert mlx_lm.load(str(tmp_path / "forced"))
    floats = saved(policy, tmp_path / "q4", edits, tmp_path / "floats", dequantize=True)
    assert max(floats.left.values()) < 1e-5
    with pytest.raises(UserError, match="is quantised, and holds no edit exactly"):
        variants.rewrite(policy, edits, "plain")


def test_what_rounding_puts_back_is_told_apart_from_what_the_weight_leaves(
    model_folder: Callable[..., Path], tmp_path: Path
):
    """At weight 1.25 a quarter is left by itself, on the other side: an exact adapter leaves it as well."""
    mlx_lm.convert(str(model_folder("llama")), mlx_path=str(tmp_path / "q4"), quantize=True, q_bits=4, q_group_size=32)
    policy = Policy.load(str(tmp_path / "q4"), cpu_dequantize="never")
    edits = edit.plan(writers.find(policy), R, 1.25)
    stored = saved(policy, tmp_path / "q4", edits, tmp_path / "forced", force=True)
    expected = {}
    for one in edits:  # by hand
        weight, r = edit.rows_of(writers.module_at(policy.model, one.writer.path)), unit(R)
        exact = weight - 1.25 * np.outer(r, r @ weight)
        again = np.array(mx.dequantize(*mx.quantize(mx.array(exact.astype(np.float32)), 32, 4), 32, 4))
        expected[one.writer.path] = np.linalg.norm(r @ (again - exact)) / np.linalg.norm(r @ weight)
    assert stored.back == pytest.approx(expected, rel=1e-2)
    assert max(stored.back.values()) < 0.2 < min(stored.left.values())
    with pytest.raises(UserError, match=rf"put {np.mean(list(expected.values())):.1%} of the direction back into"):
        saved(policy, tmp_path / "q4", edits, tmp_path / "out")
    edit.put_on(policy, edits)  # what `ablate` measures then
    told = delivery.as_stored(policy, edits, stored)
    assert "(4-bit)" in told and told.endswith(delivery.MEASURED_BEFORE)


@pytest.mark.parametrize(("dtype", "same"), [("float32", True), ("bfloat16", False)])
def test_whether_the_stored_weights_are_those_that_were_measured(
    dtype: Any, same: bool, model_folder: Callable[..., Path], tmp_path: Path
):
    folder = model_folder("llama")  # float32
    policy = Policy.load(str(folder), dtype=dtype)
    applied = variants.rewrite(policy, edit.plan(writers.find(policy), R), "plain")
    told = delivery.as_stored(policy, applied.edits, saved(policy, folder, applied.edits, tmp_path / "out"))
    assert told.endswith("These are the weights that were measured." if same else delivery.MEASURED_BEFORE)


def test_in_the_weights_and_as_an_adapter_it_is_the_same_model():
    adapted, _ = ablated("llama")
    fused = policy_of("llama")
    variants.rewrite(fused, edit.plan(writers.find(fused), R), "plain")
    assert mx.abs(adapted.model(TOKENS) - fused.model(TOKENS)).max().item() < 1e-4  # type: ignore[operator]
