# SPDX-License-Identifier: Apache-2.0
"""The one forward pass against the naive one, and every fast way of it against the plain way: values and gradients."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from policy_tools import (
    ALL,
    SHAPES,
    SHARING,
    assert_same,
    checkpointed,
    flat,
    gap,
    make_batch,
    make_examples,
    make_model,
    make_policy,
    naive_logps,
    weighed,
    with_sharing,
)

from mlx_realign import adapter, forward, prompt_caches
from mlx_realign.batch import Batch, LossOutput, Scores
from mlx_realign.config import build
from mlx_realign.data import collate
from mlx_realign.methods import sft
from mlx_realign.optim import Updater
from mlx_realign.policy import Policy
from mlx_realign.workers import split

EXACT = 2e-5  # relative, float32: what sums in another order differ by


@pytest.mark.parametrize("arch", ALL)
def test_log_probs_are_those_of_each_row_alone(arch: str):
    """The naive way: one unpadded row at a time through the bare model, log-softmax in float64."""
    policy = make_policy(arch)
    examples = make_examples(SHAPES)
    logps = np.array(with_sharing(policy, arch in SHARING).scores(collate(examples)).logps)
    for found, expected in zip(logps, naive_logps(policy.model, examples), strict=True):
        np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-4)
        assert not found[len(expected) :].any()


def test_prompts_of_one_token_are_plain_text():
    """Then there is nothing to share but a column of padding, which nobody may see."""
    policy, examples = make_policy("mistral"), make_examples([(1, [5, 12]), (1, [3])])
    for sharing in (True, False):
        logps = np.array(with_sharing(policy, sharing).scores(collate(examples)).logps)
        for found, expected in zip(logps, naive_logps(policy.model, examples), strict=True):
            np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-4)
    shared, plain = (policy_gradient(with_sharing(policy, on), collate(examples)) for on in (True, False))
    assert gap(shared, plain) <= EXACT


@pytest.mark.parametrize("arch", SHARING)
def test_shared_prompts_give_the_plain_gradient(arch: str):
    """Prompts of 1 to 19 tokens, windows of 8 where the model has one, up to three completions to a prompt."""
    policy, batch = make_policy(arch), make_batch()
    plain = policy_gradient(with_sharing(policy, False), batch)
    shared = policy_gradient(with_sharing(policy, True), batch)
    assert gap(shared, plain) <= EXACT


@pytest.mark.parametrize("arch", ["mistral", "gemma3_text", "cohere2", "gpt_oss"])
def test_windows_matter_here(arch: str, monkeypatch: pytest.MonkeyPatch):
    """The same comparison fails by far when masks forget the window: prompts are longer than it."""
    policy, batch = make_policy(arch), make_batch()
    plain = policy_gradient(with_sharing(policy, False), batch)
    right = prompt_caches._mask
    monkeypatch.setattr(prompt_caches, "_mask", lambda start, n, pad, window, array: right(start, n, pad, None, array))
    assert gap(policy_gradient(with_sharing(policy, True), batch), plain) > 0.05


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "granite", "cohere2", "llama4_text"])
def test_the_chunked_head_gives_the_gradient_of_whole_logits(arch: str):
    policy, batch = make_policy(arch), make_batch()
    policy.sharing = arch in SHARING
    chunked = policy_gradient(policy, batch)
    policy.body.whole = True
    assert gap(chunked, policy_gradient(policy, batch)) <= EXACT


@pytest.mark.parametrize(
    ("arch", "target", "dora"),
    [
        ("qwen2", "lm_head", False),
        ("qwen2", "lm_head", True),
        ("llama", "embed_tokens", False),
        ("gemma2", "embed_tokens", False),
    ],
)
def test_an_adapted_head_acts_and_is_trained(arch: str, target: str, dora: bool):
    policy = make_policy(arch, targets=target if dora else f"q_proj,{target}", dora=dora)
    policy.sharing = arch in SHARING
    examples = make_examples(SHAPES)
    logps = np.array(policy.scores(collate(examples)).logps)
    naive = naive_logps(policy.model, examples)
    with policy.adapter_off():
        bare = naive_logps(policy.model, examples)
    assert max(np.abs(x - y).max() for x, y in zip(naive, bare, strict=True)) > 0.01
    for found, expected in zip(logps, naive, strict=True):
        np.testing.assert_allclose(found[: len(expected)], expected, atol=1e-4)
    slopes = policy_gradient(policy, collate(examples))
    assert all(np.abs(value).max() > 0 for name, value in flat(slopes).items() if target in name)
    policy.body.whole = True
    assert gap(slopes, policy_gradient(policy, collate(examples))) <= EXACT


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3_text"])
def test_full_fine_tuning_has_the_gradient_of_the_naive_loss(arch: str):
    """value_and_grad of a loss written with the bare model, tied and untied heads."""
    policy = make_policy(arch, rank=0)
    policy.model.unfreeze()
    examples = make_examples(SHAPES)
    slopes = policy_gradient(policy, collate(examples))

    def naive(parameters: dict[str, Any]) -> mx.array:
        policy.model.update(parameters)
        total = mx.array(0.0)
        for example in examples:
            for tokens, mask in example.completions:
                row = mx.array(np.concatenate([example.prompt, tokens]))
                logits = policy.model(row[None])[0, len(example.prompt) - 1 : -1]
                losses = nn.losses.cross_entropy(logits, mx.array(tokens))
                weights = mx.cos(5 + mx.array(tokens).astype(mx.float32)) * mx.array(mask.astype(np.float32))
                total = total - (weights * losses).sum()
        return total

    parameters = policy.model.parameters()
    expected = mx.grad(naive)(parameters)
    policy.model.update(parameters)
    assert gap(slopes, expected) <= EXACT


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "olmoe", "mamba2", "gemma2"])
@pytest.mark.parametrize("sharing", [True, False])
def test_checkpointed_layers_give_the_same_gradient(arch: str, sharing: bool):
    sharing &= arch in SHARING
    policy, batch = with_sharing(make_policy(arch), sharing), make_batch()
    straight = policy_gradient(policy, batch)
    assert gap(policy_gradient(checkpointed(policy), batch), straight) <= 1e-5
    forward.uncheckpoint_layers(policy.model)
    assert gap(policy_gradient(policy, batch), straight) == 0


def test_checkpointed_layers_draw_the_same_dropout():
    policy, batch = make_policy("llama", dropout=0.4), make_batch()
    without = policy_gradient(policy, batch)
    adapter.set_dropout_key(policy.model, mx.random.key(7))
    straight = policy_gradient(policy, batch)
    assert gap(straight, without) > 0.05
    assert gap(policy_gradient(checkpointed(policy), batch), straight) <= 1e-5


def test_checkpointed_layers_need_less_memory():
    model = make_model("llama", num_hidden_layers=8)
    policy, batch = make_policy(model), make_batch([(80, [30, 30])] * 2)
    straight = peak_bytes(policy, batch)
    assert peak_bytes(checkpointed(policy), batch) < 0.6 * straight


def test_decoding_with_checkpointed_layers_keeps_its_cache():
    from mlx_lm.models.cache import make_prompt_cache

    policy = checkpointed(make_policy("llama"))
    tokens = mx.array([[5, 6, 7, 8, 9]])
    cache = make_prompt_cache(policy.model)
    policy.model(tokens[:, :3], cache=cache)
    stepwise = policy.model(tokens[:, 3:], cache=cache)
    np.testing.assert_allclose(stepwise, policy.model(tokens)[:, 3:], atol=1e-4)


@pytest.mark.parametrize("arch", ["llama", "gemma3_text", "qwen3_moe", "mamba2"])
def test_two_workers_give_what_one_gives(arch: str):
    one, two = make_policy(arch), make_policy(arch, workers=2)
    for policy in (one, two):
        policy.sharing = arch in SHARING
    batch = make_batch()
    assert len(split(batch, 2)) == 2
    assert_same(one, batch, two, batch, EXACT)
    np.testing.assert_allclose(one.totals(batch), two.totals(batch), rtol=EXACT)
    np.testing.assert_allclose(one.losses(batch, weighed()).total, two.losses(batch, weighed()).total, rtol=EXACT)


def test_workers_meet_no_pending_array():
    """Dropout keys and loaded weights are computed late, on the main thread, whose work a worker cannot finish."""
    policy, batch = make_policy("llama", workers=2, dropout=0.2), make_batch()
    adapter.set_dropout_key(policy.model, mx.random.key(3))
    policy.model.load_weights([(k, v * 1.5) for k, v in adapter.state(policy.model).items()], strict=False)
    found = policy.gradients(batch, weighed())[1]
    assert all(np.isfinite(value).all() for value in flat(found).values())


def test_more_workers_than_prompts():
    one, many, batch = make_policy("llama"), make_policy("llama", workers=4), make_batch([(5, [3, 4])])
    assert_same(one, batch, many, batch, EXACT)


def test_rounded_widths_change_nothing():
    policy = make_policy("gemma3_text")
    exact, rounded = make_batch(), make_batch(width=policy.width)
    assert rounded.prompt.shape[1] == 32
    assert rounded.completion.shape[1] == 16
    assert rounded.positions.size > exact.positions.size
    assert_same(policy, exact, policy, rounded, EXACT)


def test_widths_are_few_and_waste_at_most_a_fifth():
    policy = make_policy("llama", rank=0)
    widths = [policy.width(n) for n in range(1, 4097)]
    assert all(w >= n for n, w in enumerate(widths, 1))
    assert all(w <= 1.25 * n for n, w in enumerate(widths, 1) if n >= 64)
    assert len(set(widths)) <= 40


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma2"])
def test_row_order_and_more_padding_change_nothing(arch: str):
    policy = make_policy(arch)
    policy.sharing = arch in SHARING
    examples = make_examples(SHAPES)
    batch = collate(examples)
    shuffled = collate([examples[i] for i in (2, 0, 3, 1)])
    padded = collate(examples, width=lambda n: n + 7, pad_id=11)
    assert_same(policy, batch, policy, shuffled, EXACT)
    assert_same(policy, batch, policy, padded, EXACT)
    rows = np.array(policy.totals(batch))
    np.testing.assert_allclose(policy.totals(shuffled), rows[[5, 0, 1, 6, 2, 3, 4]], rtol=EXACT)


def test_four_times_one_is_one_times_four():
    policy, examples = make_policy("llama"), make_examples(SHAPES)
    out, slope = policy.gradients(collate(examples), weighed())
    parts = [policy.gradients(collate([example]), weighed()) for example in examples]
    assert sum(float(np.array(p.total)) for p, _ in parts) == pytest.approx(float(np.array(out.total)), rel=EXACT)
    assert sum(int(np.array(p.count)) for p, _ in parts) == int(np.array(out.count))
    summed = {k: sum(flat(g)[k] for _, g in parts) for k in flat(slope)}
    assert gap(summed, slope) <= EXACT


def test_rows_without_a_trained_token_count_nothing():
    policy = make_policy("llama", workers=2)
    batch = make_batch()
    nothing = batch._replace(mask=mx.zeros_like(batch.mask), positions=mx.array([], mx.int32))
    out, slope = policy.gradients(nothing, weighed())
    assert (out.total.item(), out.count.item()) == (0, 0)
    assert not any(value.any() for value in flat(slope).values())


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_trained_through(bits: int):
    model = make_model("qwen2")
    nn.quantize(model, group_size=64, bits=bits)
    policy, batch = make_policy(model), make_batch()
    shared = policy_gradient(policy, batch)
    assert gap(shared, policy_gradient(with_sharing(policy, False), batch)) <= EXACT
    policy.body.whole = True
    assert gap(shared, policy_gradient(policy, batch)) <= EXACT
    dense = make_policy(dequantized(model), moved=False)
    dense.model.load_weights(list(adapter.state(model).items()), strict=False)
    assert gap(shared, policy_gradient(dense, batch)) <= 1e-4


def dequantized(model: nn.Module) -> nn.Module:
    from mlx_lm.utils import dequantize_model

    fresh = make_model("qwen2")
    nn.quantize(fresh, group_size=64, bits=getattr(model.lm_head, "bits"))  # noqa: B009
    return dequantize_model(fresh)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_moves_the_adapter_and_not_a_bit_of_the_base(name: str):
    policy, batch = make_policy("qwen3_moe"), make_batch()
    settings = build("sft", {"model": "m", "data": "d", "optimizer": name, "weight_decay": 0.1}).settings
    trained = {path for path, _ in tree_flatten(policy.model.trainable_parameters())}
    before = {path: np.array(value) for path, value in tree_flatten(policy.model.parameters())}
    out, slope = policy.gradients(batch, weighed())
    updater = Updater(settings, policy.model.trainable_parameters())
    updater.update(policy.model, updater.clip(slope, out.count)[0], 1e-3)
    for path, value in tree_flatten(policy.model.parameters()):
        assert np.array_equal(np.array(value), before[path]) == (path not in trained), path


def test_the_reference_is_the_start_and_what_raises_inside_changes_nothing():
    policy, batch = make_policy("llama"), make_batch()
    start = np.array(policy.totals(batch))
    with policy.adapter_off():
        base = np.array(policy.totals(batch))
    policy.model.load_weights([(k, v * 2) for k, v in adapter.state(policy.model).items()], strict=False)
    now = np.array(policy.totals(batch))
    assert np.abs(now - start).max() > 0.01
    for kind, expected in (("init", start), ("base", base)):
        with policy.reference(kind):
            np.testing.assert_array_equal(policy.totals(batch), expected)
        with pytest.raises(KeyError), policy.reference(kind):
            raise KeyError
        np.testing.assert_array_equal(policy.totals(batch), now)


def test_a_loss_that_raises_leaves_no_tracer_behind():
    policy, batch = make_policy("llama"), make_batch()
    before = np.array(policy.totals(batch))

    def failing(scores: Scores, batch: Batch) -> LossOutput:
        raise KeyError

    with pytest.raises(KeyError):
        policy.gradients(batch, failing)
    np.testing.assert_array_equal(policy.totals(batch), before)


@pytest.mark.parametrize("recomputed", [False, True], ids=["", "checkpointed"])
def test_a_compiled_gradient_is_the_eager_one(recomputed: bool):
    """Also after the adapter moved, with it off, and in a second shape."""
    eager, compiled = (make_policy(make_model("llama", num_hidden_layers=1)) for _ in range(2))
    compiled.compile()
    if recomputed:
        checkpointed(compiled)
    loss = weighed()
    batches = [make_batch(width=eager.width), make_batch(SHAPES[:2], width=eager.width)]
    for batch in batches:
        assert gap(compiled.gradients(batch, loss)[1], eager.gradients(batch, loss)[1]) <= EXACT
    for policy in (compiled, eager):
        policy.model.load_weights([(k, v * 1.5) for k, v in adapter.state(policy.model).items()], strict=False)
    assert gap(compiled.gradients(batches[0], loss)[1], eager.gradients(batches[0], loss)[1]) <= EXACT
    with compiled.adapter_off(), eager.adapter_off():
        out, expected = (policy.gradients(batches[0], loss)[0].total.item() for policy in (compiled, eager))
        assert out == pytest.approx(expected, rel=EXACT)


def test_a_compiled_gradient_follows_the_temperature():
    eager, compiled = (make_policy(make_model("llama", num_hidden_layers=1)) for _ in range(2))
    compiled.compile()
    loss, batch, found = weighed(), make_batch(SHAPES[:2]), []
    for temperature in (1.0, 0.5):
        for policy in (eager, compiled):
            policy.prepare_for(frozenset(), temperature)
        found.append(compiled.gradients(batch, loss)[1])
        assert gap(found[-1], eager.gradients(batch, loss)[1]) <= EXACT
        assert compiled.traces == 1 and eager.traces == 0
    assert gap(*found) > 0.1


def test_a_compiled_loss_may_give_the_same_number_twice():
    """sft's count is one of its metrics' counts too: as two outputs of a compiled function MLX refuses them."""
    eager, compiled = (make_policy(make_model("llama", num_hidden_layers=1)) for _ in range(2))
    compiled.compile()
    batch = make_batch()
    (out, grads), (expected, wanted) = (policy.gradients(batch, sft_loss) for policy in (compiled, eager))
    assert out.total.item() == pytest.approx(expected.total.item(), rel=1e-4)
    assert out.count.item() == out.metrics["entropy"][1].item() == np.array(batch.mask).sum()
    assert {name: type(pair) for name, pair in out.metrics.items()} == dict.fromkeys(expected.metrics, tuple)
    for name, pair in expected.metrics.items():
        assert [x.item() for x in out.metrics[name]] == pytest.approx([x.item() for x in pair], rel=1e-4), name
    assert gap(grads, wanted) <= EXACT


def sft_loss(scores: Scores, batch: Batch) -> LossOutput:
    return sft.loss(scores, batch, sft.Config())


def policy_gradient(policy: Policy, batch: Batch) -> dict[str, Any]:
    return policy.gradients(batch, weighed())[1]


def peak_bytes(policy: Policy, batch: Batch) -> int:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    policy.gradients(batch, weighed())
    return mx.get_peak_memory() - before
