# SPDX-License-Identifier: Apache-2.0
"""Which layers are adapted: all linear ones of the blocks, named ones, the last blocks'; never a router."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma3n

from mlx_realign import adapter
from mlx_realign.errors import UserError

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6] * 2])


@pytest.mark.parametrize("arch", ["qwen3_moe", "olmoe"])
def test_the_router_is_never_adapted(tiny_model: Callable[..., Any], arch: str):
    model = tiny_model(arch)
    assert any(path.endswith("mlp.gate") for path, _ in model.named_modules())
    paths = adapter.attach(model, rank=2, alpha=4)
    assert not any("gate" in path.split(".") for path in paths)
    assert sum("switch_mlp" in path for path in paths) == 2 * 3
    with pytest.raises(UserError, match="routes tokens to experts"):
        adapter.attach(tiny_model(arch), rank=2, alpha=4, targets="q_proj,gate")
    with pytest.raises(UserError, match="DoRA is for linear layers"):
        adapter.attach(tiny_model(arch), rank=2, alpha=4, dora=True)


def test_targets_and_last_layers(tiny_model: Callable[..., Any]):
    model = tiny_model("lfm2")  # three blocks: convolution, attention, convolution
    found = adapter.find_targets(model, "in_proj,self_attn.q_proj")
    assert found == ["model.layers.0.conv.in_proj", "model.layers.1.self_attn.q_proj", "model.layers.2.conv.in_proj"]
    assert adapter.find_targets(model, "in_proj", layers=1) == ["model.layers.2.conv.in_proj"]
    assert adapter.find_targets(model, "embed_tokens") == ["model.embed_tokens"]
    everything = adapter.find_targets(model)
    assert not any("embed" in path for path in everything)
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in path}
    assert set(everything) == linear
    assert adapter.find_targets(tiny_model("mamba2"), layers=1) == [
        "backbone.layers.1.mixer.in_proj",
        "backbone.layers.1.mixer.out_proj",
    ]
    with pytest.raises(UserError, match="no layer is called 'qq_proj'. Known here: all-linear, .*q_proj"):
        adapter.find_targets(model, "qq_proj")
    with pytest.raises(UserError, match="leaves nothing to adapt"):
        adapter.find_targets(model, "self_attn.q_proj", layers=1)
    with pytest.raises(UserError, match="--lora-rank is 0"):
        adapter.attach(model, rank=0, alpha=1)


def test_layers_whose_weight_the_model_reads_itself_are_left_alone():
    """gemma3n clips `prediction_coefs.weight` in its forward code: an adapter there would break it."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "vocab_size": 96}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "num_kv_shared_layers": 0}
    altup = {"altup_num_inputs": 2, "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0}
    own = {"laurel_rank": 4, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8, "sliding_window": 8}
    rest = {
        "rope_theta": 1e4,
        "rope_local_base_freq": 1e4,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 16,
    }
    text = {**shape, **heads, **altup, **own, **rest, "max_position_embeddings": 64, "rope_scaling": None}
    text |= {"model_type": "gemma3n_text", "layer_types": ["sliding_attention", "full_attention"]}
    text |= {"activation_sparsity_pattern": [0.0, 0.0], "rope_traditional": False}
    mx.random.seed(0)
    model = gemma3n.Model(gemma3n.ModelArgs.from_dict({"model_type": "gemma3n", "text_config": text}))
    base = model(TOKENS)
    paths = adapter.attach(model, rank=2, alpha=4)
    assert not any("coefs" in path for path in paths) and any("laurel" in path for path in paths)
    assert mx.array_equal(model(TOKENS), base)


def test_blocks_whose_class_was_exchanged_are_found(tiny_model: Callable[..., Any]):
    model = tiny_model("llama")
    expected = adapter.find_targets(model, layers=1)
    for block in model.layers:
        block.__class__ = type("Checkpointed", (type(block),), {})
    assert adapter.attach(model, rank=2, alpha=4, layers=1) == expected
    with pytest.raises(ValueError, match="carries an adapter already"):
        adapter.attach(model, rank=2, alpha=4)
