# SPDX-License-Identifier: Apache-2.0
"""The PEFT folders whose logits `make_peft.py` computes with torch: what adapters in the wild look like.

As in `tiny.py`, all of it comes from `RandomState.random_sample`, so only the logits are committed: `peft.safetensors`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tiny import ALPHA, CONFIG, PROJECTIONS, RANK, _uniform, base_weights

TOKENS = [[5, 250, 31, 7, 7, 118, 42, 299, 3, 64], [90, 1, 260, 17, 203, 88, 9, 4, 150, 33]]
EXPERTS, WIDTH = 4, 24  # of the mixture: experts and the width of each
ATTENTION = {name: shape for name, shape in PROJECTIONS.items() if name.startswith("self_attn")}
NAMES = sorted(name.rpartition(".")[2] for name in PROJECTIONS)

UNTIED = {**CONFIG, "tie_word_embeddings": False}
MIXTURE = {
    **{key: value for key, value in CONFIG.items() if key != "mlp_bias"},
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": WIDTH,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def model_of(case: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """config.json and weights (Hugging Face names) of the base model of a case."""
    if case in ("experts", "stacked_experts"):
        return MIXTURE, mixture_weights()
    if case == "embedding":
        head = _uniform(np.random.RandomState(7), (CONFIG["vocab_size"], CONFIG["hidden_size"]), 0.3)
        return UNTIED, {**base_weights(), "lm_head.weight": head}
    return CONFIG, base_weights()


def mixture_weights() -> dict[str, np.ndarray]:
    """A mixture of experts around the attention of `tiny.base_weights`, each expert under its own name."""
    random, weights = np.random.RandomState(3), {k: v for k, v in base_weights().items() if ".mlp." not in k}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for norm in ("q_norm", "k_norm"):
            weights[f"{layer}.self_attn.{norm}.weight"] = 1 + _uniform(random, (CONFIG["head_dim"],), 0.2)
        weights[f"{layer}.mlp.gate.weight"] = _uniform(random, (EXPERTS, 32), 0.5)
        for e in range(EXPERTS):
            for name, (out, width) in expert_shapes().items():
                shape = (out, width)
                weights[f"{layer}.mlp.experts.{e}.{name}.weight"] = _uniform(random, shape, np.sqrt(3.0 / width))
    return weights


def expert_shapes() -> dict[str, tuple[int, int]]:
    """Name -> (out, in) of the layers of one expert."""
    return {"gate_proj": (WIDTH, 32), "up_proj": (WIDTH, 32), "down_proj": (32, WIDTH)}


def config_of(case: str) -> dict[str, Any]:
    """adapter_config.json of a case, without what is the same in all."""
    return {
        "plain": {"target_modules": NAMES},
        "rslora": {"target_modules": NAMES, "use_rslora": True, "lora_alpha": 6},
        "dora": {"target_modules": NAMES, "use_dora": True},
        "patterns": {
            "target_modules": NAMES,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
            "alpha_pattern": {"v_proj": 20, "layers.1.mlp.up_proj": 3},
        },
        "one_layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0]},
        "embedding": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
        "experts": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
        "stacked_experts": {
            "target_modules": ["v_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    }[case]


CASES = ("plain", "rslora", "dora", "patterns", "one_layer", "embedding", "experts", "stacked_experts")


def tensors_of(case: str) -> dict[str, np.ndarray]:
    """adapter_model.safetensors of a case; no tensor is zero."""
    random, tensors, config = np.random.RandomState(11), {}, config_of(case)

    def pair(
        path: str, out: int, width: int, rank: int = RANK, kinds: tuple[str, str] = ("A.weight", "B.weight")
    ) -> None:
        tensors[f"base_model.model.{path}.lora_{kinds[0]}"] = _uniform(random, (rank, width), np.sqrt(1.0 / width))
        tensors[f"base_model.model.{path}.lora_{kinds[1]}"] = _uniform(random, (out, rank), 0.3)

    for i in config.get("layers_to_transform", range(CONFIG["num_hidden_layers"])):
        layer = f"model.layers.{i}"
        for name, (out, width) in (ATTENTION if "experts" in case else PROJECTIONS).items():
            last = name.rpartition(".")[2]
            if last not in config["target_modules"]:
                continue
            rank = RANK
            if case == "patterns":
                rank = 2 if last == "q_proj" else 6 if f"{i}.{name}" == "1.mlp.up_proj" else RANK
            pair(f"{layer}.{name}", out, width, rank)
            if config.get("use_dora"):
                norm = np.linalg.norm(base_weights()[f"{layer}.{name}.weight"].astype(np.float64), axis=1)
                scale = 1 + _uniform(random, (out,), 0.1)
                tensors[f"base_model.model.{layer}.{name}.lora_magnitude_vector"] = (norm * scale).astype(np.float32)
        if case == "experts":
            for e in range(EXPERTS):
                for name, (out, width) in expert_shapes().items():
                    pair(f"{layer}.mlp.experts.{e}.{name}", out, width)
        if case == "stacked_experts":
            pair(f"{layer}.mlp.experts.base_layer", 2 * WIDTH, 32, RANK * EXPERTS)
            pair(f"{layer}.mlp.experts", 32, WIDTH, RANK * EXPERTS)
    if case == "embedding":
        vocabulary, width = CONFIG["vocab_size"], CONFIG["hidden_size"]
        pair("model.embed_tokens", width, vocabulary, kinds=("embedding_A", "embedding_B"))
        pair("lm_head", vocabulary, width)
    return tensors


def write_base(folder: Path, case: str) -> Path:
    """Write the base model of a case as a Hugging Face folder (no tokenizer) and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    config, weights = model_of(case)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_peft(folder: Path, case: str) -> Path:
    """Write the PEFT folder of a case and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    shared = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "inference_mode": True,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**shared, **config_of(case)}, indent=2))
    save_file(tensors_of(case), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
