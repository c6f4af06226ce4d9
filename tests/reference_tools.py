# SPDX-License-Identifier: Apache-2.0
"""Architectures whose masks or positions are their own, and gradients of unmodified mlx-lm to compare with."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from policy_tools import make_model

from mlx_realign.batch import Example

OWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": {  # latent attention: half of the scores comes as an additive mask
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "qk_nope_head_dim": 16,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "rope_scaling": None,
    },
    "ministral3": {  # queries are scaled by the logarithm of their position, which padding would have below 0
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 8,
        "rope_parameters": {
            "rope_theta": 10000.0,
            "rope_type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 16,
        },
    },
}


def own_model(arch: str) -> nn.Module:
    """With weights large enough that attention looks at something."""
    model = make_model(arch, **OWN[arch])
    model.update(tree_map(lambda x: x * 2.5 if x.ndim > 1 else x, model.parameters()))
    mx.eval(model.parameters())
    return model


def stock_gradient(model: nn.Module, examples: list[Example]) -> Any:
    """Of the sum that `policy_tools.weighed` takes, by the model's own code and MLX, each row alone and unpadded."""
    start, total = model.trainable_parameters(), None
    for example in examples:
        for tokens, mask in example.completions:
            row, length = mx.array(np.concatenate([example.prompt, tokens]))[None], len(tokens)
            weights = mx.where(mx.array(mask), mx.cos(5 + mx.array(tokens).astype(mx.float32)), 0)

            def loss(parameters: Any, row: Any = row, length: int = length, weights: Any = weights) -> mx.array:
                model.update(parameters)
                logits = model(row[:, :-1])[0, -length:]
                every = logits - mx.logsumexp(logits, -1, keepdims=True)
                return (mx.take_along_axis(every, row[0, -length:, None], 1)[:, 0] * weights).sum()

            slopes = mx.grad(loss)(start)
            total = slopes if total is None else tree_map(mx.add, total, slopes)
            mx.eval(total)
    model.update(start)
    return total
