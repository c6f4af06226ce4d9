# SPDX-License-Identifier: Apache-2.0
"""Tiny models whose blocks are called in other ways than llama's: by keyword, with tuples of caches, or not at all."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from policy_tools import make_model

LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
ODD: dict[str, dict[str, Any]] = {
    "gptj": {  # block(inputs=..., mask=..., cache=...)
        "n_embd": 64,
        "n_positions": 512,
        "n_head": 4,
        "rotary_dim": 8,
        "n_layer": 2,
        "layer_norm_epsilon": 1e-5,
    },
    "falcon_h1": {  # attention and a state space side by side; without a cache each block gets (None, None)
        "attention_bias": False,
        "mlp_bias": False,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
        "embedding_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
    },
    "longcat_flash": {  # two attentions a block, experts that give back what they read
        **LATENT,
        "attention_bias": False,
        "attention_method": "MLA",
        "zero_expert_type": "identity",
        "ffn_hidden_size": 64,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 32,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "num_layers": 2,
        "routed_scaling_factor": 1.5,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "afm7": {  # upper blocks are given keys and values, from a cache that the model makes for itself
        "hidden_dim": 64,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "hidden_dim_scale_factor": 2.0,
    },
    "dbrx": {  # a module for each expert, called token by token
        "d_model": 64,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000},
        "n_layers": 2,
        "n_heads": 4,
    },
    "baichuan_m1": {  # convolutions of keys and values, zero until they are trained
        "sliding_window": 8,
        "sliding_window_layers": [0],
        "conv_window": 2,
        "tie_word_embeddings": False,
    },
    "iquestloopcoder": {"loop_num": 2, "loop_window_size": 8, "attention_bias": False, "mlp_bias": False},
}
TAPPED = ["gptj", "falcon_h1", "longcat_flash", "afm7", "dbrx", "baichuan_m1"]  # those with blocks that are called


def odd_model(arch: str) -> nn.Module:
    """Random float32 weights, none of them zero: 64 wide, 2 blocks (afm7 has 4)."""
    model = make_model(arch, **ODD[arch])
    keys = iter(mx.random.split(mx.random.key(3), 500))
    widen = lambda _, x: x * 1.5 if x.ndim == 2 else x + 0.05 * mx.random.normal(x.shape, key=next(keys))  # noqa: E731
    model.update(tree_map_with_path(widen, model.parameters()))
    mx.eval(model.parameters())
    return model
