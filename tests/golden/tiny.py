# SPDX-License-Identifier: Apache-2.0
"""The tiny llama, its adapter and its rows that the committed numbers of this folder were made with.

Weights come from `RandomState(seed).random_sample`, whose stream NumPy guarantees bit for bit on every platform and in
every version, so nothing large is committed; the weights' `fingerprint` is in each JSON file beside the numbers.
NumPy and safetensors only: the script that makes the numbers (torch) and the tests (MLX) both import it.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
TOKENIZER = HERE / "tokenizer"  # byte-level BPE of 300 tokens; ChatML, nothing after the last <|im_end|>

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 304,  # four more than the tokenizer has, as in most real models
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
RANK, ALPHA = 4, 8.0
PROJECTIONS = {  # block-relative name -> (out, in)
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}


def base_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Hugging Face names -> float32; linear weights [out, in] of standard deviation 1 / sqrt(in), norms near 1."""
    random = np.random.RandomState(seed)

    def linear(out: int, width: int) -> np.ndarray:
        return _uniform(random, (out, width), np.sqrt(3.0 / width))

    weights = {"model.embed_tokens.weight": _uniform(random, (CONFIG["vocab_size"], CONFIG["hidden_size"]), 0.6)}
    for i in range(CONFIG["num_hidden_layers"]):
        for name, (out, width) in PROJECTIONS.items():
            weights[f"model.layers.{i}.{name}.weight"] = linear(out, width)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{norm}.weight"] = 1 + _uniform(random, (CONFIG["hidden_size"],), 0.2)
    weights["model.norm.weight"] = 1 + _uniform(random, (CONFIG["hidden_size"],), 0.2)
    return weights


def adapter_weights(seed: int = 1, dora: bool = False) -> dict[str, np.ndarray]:
    """PEFT's names and orientation, float32: lora_A [rank, in], lora_B [out, rank], magnitude [out]; none zero."""
    random, base = np.random.RandomState(seed), base_weights()
    weights = {}
    for i in range(CONFIG["num_hidden_layers"]):
        for name, (out, width) in PROJECTIONS.items():
            path = f"base_model.model.model.layers.{i}.{name}"
            weights[f"{path}.lora_A.weight"] = _uniform(random, (RANK, width), np.sqrt(1.0 / width))
            weights[f"{path}.lora_B.weight"] = _uniform(random, (out, RANK), 0.2)
            if dora:  # 10% off the norm that a fresh DoRA adapter starts from, so that it is not a no-op
                norm = np.linalg.norm(base[f"model.layers.{i}.{name}.weight"].astype(np.float64), axis=1)
                magnitude = norm * (1 + _uniform(random, (out,), 0.1))
                weights[f"{path}.lora_magnitude_vector"] = magnitude.astype(np.float32)
    return weights


def write_model(folder: Path) -> Path:
    """Write a Hugging Face model folder (config, model.safetensors, tokenizer) and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    save_file(base_weights(), folder / "model.safetensors", {"format": "pt"})
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def write_adapter(folder: Path, dora: bool = False) -> Path:
    """Write the start adapter as a PEFT folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_dora": dora,
        "target_modules": [name.split(".")[-1] for name in PROJECTIONS],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(adapter_weights(dora=dora), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def fingerprint(weights: dict[str, np.ndarray]) -> str:
    """SHA-256 over names and little-endian float32 bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].astype("<f4").tobytes())
    return digest.hexdigest()


def _uniform(random: np.random.RandomState, shape: tuple[int, ...], limit: float) -> np.ndarray:
    return ((2 * random.random_sample(shape) - 1) * limit).astype(np.float32)
