# SPDX-License-Identifier: Apache-2.0
"""Writers of many architectures against what their code says, gains against their norms, and what is not found."""

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path
from odd_models import ODD, odd_model
from policy_tools import make_model, make_policy

from mlx_realign import taps, writers
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy

DENSE = [("self_attn.o_proj", "attention"), ("mlp.down_proj", "mlp")]
EXPERTS = [("self_attn.o_proj", "attention"), ("mlp.switch_mlp.down_proj", "experts")]
CONV, ATTENTION = [("conv.out_proj", "attention")], [("self_attn.out_proj", "attention")]
# Read from mlx-lm 0.32.2's code of each: what is added to the stream in each block, in order.
BLOCKS: dict[str, list[list[tuple[str, str]]]] = {
    "llama": [DENSE] * 2,
    "phi3": [DENSE] * 2,
    "cohere2": [DENSE] * 2,  # attention and MLP side by side
    "granite": [DENSE] * 2,  # residuals times 0.5
    "gemma2": [DENSE] * 2,
    "gemma3_text": [DENSE] * 3,
    "olmo2": [DENSE] * 2,
    "qwen3_moe": [EXPERTS] * 2,
    "gpt_oss": [[DENSE[0], ("mlp.experts.down_proj", "experts")]] * 2,
    "mamba2": [[("mixer.out_proj", "attention")]] * 2,
    "lfm2": [[*mixer, ("feed_forward.w2", "mlp")] for mixer in (CONV, ATTENTION, CONV)],
}


GEMMA4 = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 320,
    "num_kv_shared_layers": 0,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}


def policy_of(arch: str, bits: int | None = None, dtype: mx.Dtype = mx.float32, **changes: Any) -> Policy:
    """A tiny random model whose norms have gains, as trained ones do."""
    model = make_model(arch, **changes)
    keys = iter(mx.random.split(mx.random.key(7), 200))
    jitter = lambda path, x: x + 0.3 * mx.random.normal(x.shape, key=next(keys)) if "norm" in path else x  # noqa: E731
    model.update(tree_map_with_path(jitter, model.parameters()))
    if bits:
        nn.quantize(model, 32, bits)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return make_policy(model, rank=0)


@pytest.mark.parametrize("arch", BLOCKS)
def test_all_that_a_block_adds_to_the_stream_is_found(arch: str):
    policy = policy_of(arch)
    found = writers.find(policy)
    told = [[(w.path.split(".", 3)[3], w.kind) for w in found if w.block == b] for b in range(len(BLOCKS[arch]))]
    assert told == BLOCKS[arch]
    assert writers.rest(policy, found) == []


LONGCAT = [("mlp.switch_mlp.down_proj", "experts")]
for i in (0, 1):
    LONGCAT += [(f"mlps.{i}.down_proj", "mlp"), (f"self_attn.{i}.o_proj", "attention")]
# As BLOCKS, sorted; the experts of dbrx are modules of their own.
ODD_BLOCKS: dict[str, list[tuple[str, str]]] = {
    "gptj": [("attn.out_proj", "attention"), ("mlp.fc_out", "mlp")],
    "baichuan_m1": [DENSE[1], DENSE[0]],
    "falcon_h1": [("feed_forward.down_proj", "mlp"), ("mamba.out_proj", "attention"), DENSE[0]],
    "afm7": [DENSE[1], ("self_attn.out_proj", "attention")],
    "dbrx": [*((f"ffn.experts.{e}.w2", "experts") for e in range(4)), ("norm_attn_norm.attn.out_proj", "attention")],
    "longcat_flash": sorted(LONGCAT),
}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("arch", ODD_BLOCKS)
def test_writers_of_odd_blocks_are_named_rightly(arch: str, zero: bool):
    """zero: as built; then values of baichuan_m1 are zero, and its attention gives the same whatever it reads."""
    policy = make_policy(make_model(arch, **ODD[arch]) if zero else odd_model(arch), rank=0)
    before = {path: np.array(x) for path, x in tree_flatten(policy.model.parameters())}
    found = writers.find(policy)
    for b in range(len(taps.blocks(policy.model))):
        mine = [w for w in found if w.block == b]
        told = sorted((re.split(r"(?:layers|h|blocks)\.\d+\.", w.path)[1], w.kind) for w in mine)
        assert told == ODD_BLOCKS[arch]
    left = max([one.share for one in writers.rest(policy, found)], default=0.0)
    assert left < (0.1 if arch == "longcat_flash" else 1e-9)  # its experts give back what a norm with gains gives them
    for path, x in tree_flatten(policy.model.parameters()):
        np.testing.assert_array_equal(x, before[path])


@pytest.mark.parametrize(("arch", "bits"), [("qwen3_moe", 4), ("llama", 4), ("gemma2", 8)])
def test_quantised_layers_are_writers_too(arch: str, bits: int):
    found = writers.find(policy_of(arch, bits))
    assert [[(w.path.split(".", 3)[3], w.kind) for w in found if w.block == b] for b in range(2)] == BLOCKS[arch]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    ("arch", "norms", "offset"),
    [
        ("gemma2", ("post_attention_layernorm", "post_feedforward_layernorm"), 1.0),
        ("gemma3_text", ("post_attention_layernorm", "post_feedforward_layernorm"), 1.0),
        ("olmo2", ("post_attention_layernorm", "post_feedforward_layernorm"), 0.0),
    ],
)
def test_gains_are_those_of_the_norms_in_between(arch: str, norms: tuple[str, str], offset: float, dtype: mx.Dtype):
    policy = policy_of(arch, dtype=dtype)
    for writer in writers.find(policy):
        block: Any = policy.model.layers[writer.block]  # pyright: ignore[reportOptionalSubscript]
        weight = block[norms[0] if writer.kind == "attention" else norms[1]].weight
        expected = np.array((weight + offset).astype(mx.float32)).astype(np.float64)
        assert writer.gain is not None
        cosine = expected @ writer.gain / np.linalg.norm(expected) / np.linalg.norm(writer.gain)
        assert 1 - cosine < 1e-9, f"{writer.path}: {cosine}"  # also in bfloat16: what is measured is made exact


def test_gains_of_two_norms_in_a_row_are_multiplied():
    """Gemma 4's experts and MLP have a norm each, and one around their sum; its embeddings per layer write as well."""
    policy = policy_of("gemma4_text", **GEMMA4)
    found = {writer.path.split(".", 3)[3]: writer for writer in writers.find(policy) if writer.block == 0}
    block: Any = policy.model.layers[0]  # pyright: ignore[reportOptionalSubscript]
    norms = {
        "self_attn.o_proj": ["post_attention_layernorm"],
        "mlp.down_proj": ["post_feedforward_layernorm", "post_feedforward_layernorm_1"],
        "experts.switch_glu.down_proj": ["post_feedforward_layernorm", "post_feedforward_layernorm_2"],
        "per_layer_projection": ["post_per_layer_input_norm"],
    }
    assert found.keys() == norms.keys() and writers.rest(policy, list(found.values())) != []  # block 1's are missing
    for path, between in norms.items():
        expected = np.prod([np.array(block[name].weight).astype(np.float64) for name in between], axis=0)
        gain: Any = found[path].gain
        np.testing.assert_allclose(gain / np.linalg.norm(gain), expected / np.linalg.norm(expected), atol=1e-6)


def test_without_a_norm_in_between_there_is_no_gain():
    for arch in ("llama", "granite", "cohere2", "lfm2"):
        assert all(writer.gain is None for writer in writers.find(policy_of(arch)))


def test_what_must_go_so_that_nothing_gets_through_a_gain():
    rng = np.random.default_rng(0)
    gain, rows, y = rng.uniform(0.2, 3, 16), rng.standard_normal((3, 16)), rng.standard_normal((50, 16))
    basis = writers.Writer("x", 0, "mlp", gain).basis(rows)
    np.testing.assert_allclose(basis @ basis.T, np.eye(3), atol=1e-12)
    left = y - (y @ basis.T) @ basis
    assert np.abs((left * gain) @ rows.T).max() < 1e-12
    one = writers.Writer("x", 0, "mlp", gain).basis(rows[0])
    np.testing.assert_allclose(one[0], gain * rows[0] / np.linalg.norm(gain * rows[0]), rtol=1e-12)
    assert len(writers.Writer("x", 0, "mlp", None).basis(np.stack([rows[0], 2 * rows[0], rows[1]]))) == 2


def test_an_adapted_model_has_the_same_writers():
    plain, adapted = writers.find(make_policy("llama", rank=0)), writers.find(make_policy("llama"))
    assert [(w.path, w.kind, w.gain) for w in adapted] == [(w.path, w.kind, w.gain) for w in plain]


# ------------------------------------------------------------------ blocks nobody has heard of


class Scaled:
    """A llama block whose MLP reaches the stream through a number per entry (LayerScale)."""

    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return h + self.each * self.mlp(self.post_attention_layernorm(h))


class Secret:
    """A llama block that also writes by a matrix of its own, which no layer holds."""

    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h)) + mx.tanh(h) @ self.each


class Gated:
    """A llama block whose MLP reaches the stream through gates per entry that depend on the token."""

    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        h = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return h + mx.sigmoid(20 * h * self.each) * self.mlp(self.post_attention_layernorm(h))


def odd(how: type, each: mx.array) -> Policy:
    model: Any = make_model("llama")
    block = model.layers[1]
    block.__class__ = type(how.__name__, (how, type(block)), {})
    block.each = each
    return make_policy(model, rank=0)


def test_gains_that_belong_to_no_norm_are_measured():
    each = mx.random.uniform(0.2, 2, (64,), key=mx.random.key(1))
    policy = odd(Scaled, each)
    found = writers.find(policy)
    assert [writer.gain is None for writer in found] == [True, True, True, False]
    gain: Any = found[3].gain
    expected = np.array(each).astype(np.float64)
    np.testing.assert_allclose(gain / gain[0], expected / expected[0], rtol=1e-4)


def test_what_writes_by_other_ways_is_told_and_not_passed_over():
    policy = odd(Secret, 0.2 * mx.random.normal((64, 64), key=mx.random.key(2)))
    found = writers.find(policy)
    [told] = writers.rest(policy, found)
    assert told.block == 1 and told.share > 0.05
    assert "model.layers.1.self_attn.q_proj" in told.modules  # as wide as the stream, and no writer
    assert "model.layers.1.mlp.down_proj" not in told.modules


def test_what_no_projection_can_empty_is_told():
    """Behind gates that change with the token, what is taken out of a writer comes back."""
    policy = odd(Gated, mx.random.normal((64,), key=mx.random.key(3)))
    found = writers.find(policy)
    assert [rest.block for rest in writers.rest(policy, found)] == [1]
    named = writers.find(policy, ["mlp.down_proj"])  # nor when the user says it is one
    assert [rest.block for rest in writers.rest(policy, named)] == [1]


def test_the_user_names_more_writers():
    policy = make_policy("llama", rank=0)
    found = writers.find(policy, ["self_attn.q_proj"])
    assert sum(writer.path.endswith("q_proj") for writer in found) == 2
    with pytest.raises(UserError, match=r"--writers o_prj: no layer that gives 64 .* Did you mean o_proj\?"):
        writers.find(policy, ["o_prj"])


def test_nothing_stays_behind_on_the_model():
    policy = policy_of("gemma2")
    tokens = mx.array([[1, 2, 3, 4]])
    before, kinds = policy.model(tokens), [type(module) for _, module in policy.model.named_modules()]
    writers.rest(policy, writers.find(policy))
    assert mx.array_equal(policy.model(tokens), before)
    assert [type(module) for _, module in policy.model.named_modules()] == kinds
