# SPDX-License-Identifier: Apache-2.0
"""What config.json says and mlx-lm's model files do not read is told where it changes the arithmetic, there alone."""

import copy
from typing import Any

import pytest
from test_arguments import YARN, complete

# As they lie in the hub, what names files and tokens left out.
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": {
        **{"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024},
        **{"intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28},
        **{"num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06},
        **{"rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True},
        **{"use_sliding_window": False, "vocab_size": 151936},
    },
    "Qwen2.5-0.5B": {
        **{"model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864},
        **{"max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14},
        **{"num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0},
        **{"sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False},
        **{"vocab_size": 151936},
    },
    "Qwen3-30B-A3B": {
        **{"model_type": "qwen3_moe", "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu"},
        **{"hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": []},
        **{"moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128},
        **{"num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06},
        **{"rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None},
        **{"tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936, "attention_bias": False},
    },
    "Llama-3.2-1B": {
        **{"model_type": "llama", "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048},
        **{"intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "pretraining_tp": 1},
        **{"num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05},
        "rope_scaling": {
            **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
            **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
        **{"rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256},
    },
    "SmolLM2-135M": {
        **{"model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 576, "mlp_bias": False},
        **{"intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192},
        **{"num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1},
        **{"rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000},
        **{"tie_word_embeddings": True, "vocab_size": 49152},
    },
    "Mistral-7B-v0.3": {
        **{"model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336},
        **{"max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32},
        **{"num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None},
        **{"tie_word_embeddings": False, "vocab_size": 32768},
    },
    "gemma-3-1b": {
        **{"model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None, "head_dim": 256},
        **{"final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152},
        **{"intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4},
        **{"num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06},
        **{"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512},
        **{"sliding_window_pattern": 6, "vocab_size": 262144, "cache_implementation": "hybrid"},
    },
    "gemma-3-4b": {
        **{"model_type": "gemma3", "mm_tokens_per_image": 256, "vision_config": {"hidden_size": 1152}},
        "text_config": {
            **{"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "sliding_window": 1024},
            **{"num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        },
    },
    "OLMo-2-1B": {
        **{"model_type": "olmo2", "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048},
        **{"intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 16},
        **{"num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-06, "rope_scaling": None},
        **{"rope_theta": 500000, "tie_word_embeddings": False, "vocab_size": 100352},
    },
    "SmolLM3-3B": {
        **{"model_type": "smollm3", "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048},
        **{"intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536},
        **{"max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4, "num_attention_heads": 16},
        **{"no_rope_layers": [1, 1, 1, 0] * 9, "num_hidden_layers": 36, "num_key_value_heads": 4},
        **{"rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None},
        **{"use_sliding_window": False, "vocab_size": 128256, "pretraining_tp": 2},
    },
    "Mixtral-8x7B": {
        **{"model_type": "mixtral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336},
        **{"max_position_embeddings": 32768, "num_attention_heads": 32, "num_experts_per_tok": 2},
        **{"num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "rms_norm_eps": 1e-05},
        **{"rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None, "vocab_size": 32000},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_as_published_are_read_in_full(name: str):
    config = copy.deepcopy(PUBLISHED[name])
    assert complete(config) == []


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("Mistral-7B-v0.3", {"sliding_window": 4096}, "sliding_window 4096, which"),
        ("SmolLM2-135M", {"hidden_act": "gelu"}, "hidden_act gelu, which mlx-lm's llama"),
        ("gemma-3-1b", {"hidden_activation": "silu"}, "hidden_activation silu, which mlx-lm's gemma3_text"),
        ("gemma-3-1b", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0, which"),
        ("Llama-3.2-1B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5, which"),
        ("Llama-3.2-1B", {"residual_multiplier": 0.22}, "residual_multiplier 0.22, which"),
        ("Llama-3.2-1B", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256, which"),
        ("OLMo-2-1B", {"clip_qkv": 8.0}, "clip_qkv 8.0, which"),
        ("Qwen3-30B-A3B", {"rope_scaling": {**YARN, "rope_theta": 1e6}}, "rope_scaling of type yarn, which"),
        ("Qwen3-0.6B", {"rope_scaling": {**YARN, "attention_factor": 1.3}}, "rope_scaling.attention_factor 1.3, which"),
    ],
)
def test_a_key_that_changes_the_arithmetic_and_is_not_read_is_told(name: str, change: dict[str, Any], said: str):
    notes = complete({**copy.deepcopy(PUBLISHED[name]), **change})
    assert len(notes) == 1
    assert notes[0].startswith(f"config.json says {said}")


OLMO3 = {
    **{"model_type": "olmo3", "hidden_size": 4096, "num_hidden_layers": 4, "intermediate_size": 11008},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "vocab_size": 100278},
    **{"max_position_embeddings": 65536, "sliding_window": 4096, "rope_theta": 500000.0, "hidden_act": "silu"},
    "rope_scaling": {
        **{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "beta_fast": 32.0},
        **{"beta_slow": 1.0, "attention_factor": 1.2079441541679836},  # 0.1 ln(8) + 1
    },
}
QWEN1 = {
    "model_type": "qwen",
    "rotary_emb_base": 10000,
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "rotary_pct": 1.0,
}
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
NANOCHAT = {"model_type": "nanochat", **SMALL, "intermediate_size": 128, "final_logit_softcapping": 15.0}
MIMO = {"model_type": "mimo_v2_flash", **SMALL, "sliding_window": 128, "sliding_window_size": 128, "rope_theta": 1e4}
GROWN = {**OLMO3["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 1.0, "truncate": True}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (OLMO3, {}, ""),
        (
            OLMO3,
            {"rope_scaling": {**OLMO3["rope_scaling"], "attention_factor": 1.0}},
            "rope_scaling.attention_factor 1.0",
        ),
        (OLMO3, {"rope_scaling": GROWN}, ""),
        (OLMO3, {"rope_scaling": {**GROWN, "truncate": False}}, "rope_scaling.truncate False"),
        # sqrt(1 + ln(65536 / 4096) / ln(4096)) = sqrt(4 / 3)
        (
            OLMO3,
            {"rope_scaling": {**LONG, "original_max_position_embeddings": 4096, "attention_factor": 1.1547005}},
            "",
        ),
        (
            OLMO3,
            {"rope_scaling": {**LONG, "original_max_position_embeddings": 4096, "attention_factor": 1.19}},
            "rope_scaling.attention_factor 1.19",
        ),
        (OLMO3, {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 1.0}}, ""),
        (QWEN1, {}, ""),
        (QWEN1, {"rotary_emb_base": 1000000}, "rotary_emb_base 1000000"),
        (PUBLISHED["Llama-3.2-1B"], {"mlp_multipliers": [1.0, 1.0], "rope_local_base_freq": 500000.0}, ""),
        (PUBLISHED["Llama-3.2-1B"], {"mlp_multipliers": [1.0, 2.0]}, "mlp_multipliers [1.0, 2.0]"),
        (PUBLISHED["Llama-3.2-1B"], {"rope_local_base_freq": 10000.0}, "rope_local_base_freq 10000.0"),
        (PUBLISHED["Llama-3.2-1B"], {"attention_chunk_size": 131072, "query_pre_attn_scalar": 64}, ""),
        (PUBLISHED["Llama-3.2-1B"], {"attention_chunk_size": 8192}, "attention_chunk_size 8192"),
        (NANOCHAT, {}, ""),
        (NANOCHAT, {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        (MIMO, {}, ""),
        (MIMO, {"sliding_window": 64}, "sliding_window 64"),
        (PUBLISHED["OLMo-2-1B"], {"query_pre_attn_scalar": 128}, ""),  # of 2048 / 16, as no head_dim is said
        # Qwen 2 slides only where it is told to, and then from layer max_window_layers on.
        (PUBLISHED["Qwen2.5-0.5B"], {"use_sliding_window": None, "sliding_window": 4096}, ""),
        (PUBLISHED["Qwen2.5-0.5B"], {"use_sliding_window": True, "sliding_window": 4096}, ""),
        (
            PUBLISHED["Qwen2.5-0.5B"],
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20},
            "sliding_window 4096",
        ),
    ],
)
def test_what_mlx_lm_does_anyway_is_not_told(config: dict[str, Any], change: dict[str, Any], said: str):
    config = {**copy.deepcopy(config), **copy.deepcopy(change)}
    notes = complete({key: value for key, value in config.items() if value is not None})
    assert len(notes) == bool(said)
    assert all(note.startswith(f"config.json says {said}, which mlx-lm's") for note in notes)
