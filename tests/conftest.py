# SPDX-License-Identifier: Apache-2.0
"""Tiny random models, made in a blink and the same every time."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a network; those marked `download` clear it

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # an M5 and CUDA multiply float32 with 10 bits otherwise
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy's too: there are as many processes as cores

import mlx_realign  # noqa: F401, I001

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm.utils import _get_classes, save_model
from mlx_realign import blas
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# What a command says of this machine's BLAS would stand beside the lines that tests count; tests/test_blas.py has it.
blas.adopt(blas.in_use()._replace(rejected=(), name=blas.in_use().name if blas.in_use().library else ""))

VOCAB_SIZE = 320  # 256 bytes, ChatML's 3 special tokens and reserved ones, so that every id decodes

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_LLAMA = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}

# What differs from a plain llama, by architecture: tied and untied heads, windows shorter than the tests' prompts,
# experts, norms after the blocks, layers without attention.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": 8,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16,
    },
    "phi3": {"tie_word_embeddings": False, "original_max_position_embeddings": 512},
    "qwen3_moe": {**_EXPERTS, "moe_intermediate_size": 64, "decoder_sparse_step": 1, "mlp_only_layers": []},
    "olmoe": {**_EXPERTS, "tie_word_embeddings": False},
    "olmo2": {"tie_word_embeddings": False},
    "mamba2": {
        "num_heads": 8,
        "head_dim": 16,
        "intermediate_size": 128,
        "state_size": 16,
        "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4,
        "n_groups": 1,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_limit": [0.001, 100.0],
        "time_step_rank": "auto",
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "norm_eps": 1e-5,
        "conv_bias": False,
        "conv_L_cache": 3,
        "block_dim": 64,
        "block_ff_dim": 128,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention", "conv"],
    },
}


def model_config(arch: str) -> dict[str, Any]:
    """The config.json of a tiny model of this architecture."""
    return {"model_type": arch, **_LLAMA, **ARCHITECTURES[arch], "eos_token_id": 257, "pad_token_id": 258}


def build_model(arch: str, seed: int = 0) -> nn.Module:
    """A random float32 model; its logits spread by about 1, so log-probs differ clearly between tokens."""
    config = model_config(arch)
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    widen = lambda path, value: value * 1.7 if value.ndim == 2 else value  # noqa: E731 - layers start at std 0.6 / sqrt(n)
    model.update(tree_map_with_path(widen, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def write_tokenizer(folder: Path, chat_template: str | None = CHATML) -> None:
    """A byte-level tokenizer: ids 0-255 are bytes (in the byte-level alphabet's order), then ChatML's tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    special += [f"<|reserved_{i}|>" for i in range(VOCAB_SIZE - len(alphabet) - len(special))]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def write_model_folder(folder: Path, arch: str = "llama", seed: int = 0, chat_template: str | None = CHATML) -> Path:
    """A Hugging Face model folder that mlx_lm loads: config, weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, build_model(arch, seed))
    (folder / "config.json").write_text(json.dumps(model_config(arch), indent=1))
    write_tokenizer(folder, chat_template)
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random llama with a byte-level ChatML tokenizer. Read only: it is shared by all tests."""
    return write_model_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., nn.Module]:
    """`tiny_model("qwen3", seed=0)` makes a fresh tiny random float32 model; ARCHITECTURES lists the names."""
    return build_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_folder("qwen3", chat_template=None)` writes the folder of a tiny model and returns it."""

    def make(arch: str = "llama", seed: int = 0, chat_template: str | None = CHATML) -> Path:
        return write_model_folder(tmp_path_factory.mktemp("models") / arch, arch, seed, chat_template)

    return make
