# SPDX-License-Identifier: Apache-2.0
"""The tiny qwen3_moe and the router logits that `balance.json` was made with; NumPy and safetensors only."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

COEFFICIENT = 0.5  # large, so that a missing or wrong gradient of the loss shows
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "router_aux_loss_coef": COEFFICIENT,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
# (prompt, completions): the second prompt is shared by two, so its tokens count twice.
ROWS = [
    ([5, 9, 14], [[17, 3, 60, 61, 8, 42]]),
    ([33, 7, 7, 301, 12], [[20, 21, 22, 23], [200, 6]]),
    ([99], [[4, 11, 90]]),
]


def weights(seed: int = 3) -> dict[str, np.ndarray]:
    """Hugging Face names, experts one by one -> float32."""
    random = np.random.RandomState(seed)
    hidden, experts = CONFIG["hidden_size"], CONFIG["num_experts"]

    def linear(out: int, width: int, gain: float = 1.0) -> np.ndarray:
        return ((2 * random.random_sample((out, width)) - 1) * gain * np.sqrt(3.0 / width)).astype(np.float32)

    def norm(width: int) -> np.ndarray:
        return (1 + 0.2 * (2 * random.random_sample(width) - 1)).astype(np.float32)

    found = {"model.embed_tokens.weight": linear(CONFIG["vocab_size"], hidden, 3.0), "model.norm.weight": norm(hidden)}
    for i in range(CONFIG["num_hidden_layers"]):
        home = f"model.layers.{i}"
        for name, out, width in (("q", 32, hidden), ("k", 16, hidden), ("v", 16, hidden), ("o", hidden, 32)):
            found[f"{home}.self_attn.{name}_proj.weight"] = linear(out, width)
        for name in ("q_norm", "k_norm"):
            found[f"{home}.self_attn.{name}.weight"] = norm(CONFIG["head_dim"])
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{home}.{name}.weight"] = norm(hidden)
        found[f"{home}.mlp.gate.weight"] = linear(experts, hidden, 2.0)
        for e in range(experts):
            for name, out, width in (("gate", 16, hidden), ("up", 16, hidden), ("down", hidden, 16)):
                found[f"{home}.mlp.experts.{e}.{name}_proj.weight"] = linear(out, width)
    return found


def write_mixture(folder: Path) -> Path:
    """A Hugging Face model folder (config and weights) and its path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    save_file(weights(), folder / "model.safetensors", {"format": "pt"})
    return folder


def fixed_logits() -> tuple[list[np.ndarray], np.ndarray]:
    """Three layers' router logits [2 * 7, 6] float32, and the mask int64 [2, 7] of real tokens."""
    random = np.random.RandomState(4)
    logits = [(3 * random.standard_normal((14, 6))).astype(np.float32) for _ in range(3)]
    return logits, np.array([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]], np.int64)
