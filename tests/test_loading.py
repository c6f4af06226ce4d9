# SPDX-License-Identifier: Apache-2.0
"""From a name to a model: what is wrong is one line, weights are held once, quantised ones keep their values."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer
from grid_models import write_folder
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_model

from mlx_realign import loading
from mlx_realign.errors import UserError
from mlx_realign.loading import load

TOKENS = mx.array([[5, 9, 200, 3, 17, 42, 8]])


@pytest.fixture
def folder(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of a tiny model's folder, to be broken."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def refusal(name: str | Path, **options: Any) -> str:
    """The one line a user gets."""
    with pytest.raises(UserError) as caught:
        load(str(name), **options)
    text = str(caught.value)
    assert text.startswith(f"--model {name}: ")
    assert "\n" not in text
    assert len(text) < 600
    return text.removeprefix(f"--model {name}: ")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---------------------------------------------------------------------------------------------- one line each


def test_no_name():
    with pytest.raises(UserError, match="^--model is missing: give a model folder, a hub id"):
        load("")


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "no-such-model", "a/b/c"])
def test_not_a_folder_and_not_an_id(name: str):
    assert refusal(name) == "no such folder, and it is not a hub id (owner/name)"


def test_a_hub_id_offline():
    assert refusal("nobody/no-such-model").startswith("not on this machine, and the hub cannot be reached or does not")


def test_a_folder_without_config(folder: Path):
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


def test_a_config_that_is_not_json(folder: Path):
    (folder / "config.json").write_text('{"model_type": ')
    assert refusal(folder).startswith("cannot be loaded: config.json is not valid JSON: Expecting value: line 1")


def test_a_config_without_a_field(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    del config["hidden_size"], config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert refusal(folder) == "cannot be loaded: config.json lacks hidden_size, vocab_size"


def test_a_folder_without_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "has no model*.safetensors; convert the weights to safetensors first" in refusal(folder)


def test_a_folder_with_a_weight_file_missing(folder: Path):
    listed = {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    assert "lacks model-00002-of-00002.safetensors of 2 weight files" in refusal(folder)


def test_weights_without_a_tensor(folder: Path):
    tensors: Any = mx.load(str(folder / "model.safetensors"))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder)


def test_weights_of_another_shape(folder: Path):
    change_config(folder, hidden_size=128)
    assert "shape" in refusal(folder)


def test_an_unknown_architecture(folder: Path):
    change_config(folder, model_type="squirrel")
    assert "squirrel not supported" in refusal(folder)


def test_an_unknown_kind_of_positions(folder: Path):
    change_config(folder, rope_scaling={"rope_type": "spiral", "factor": 2.0})
    assert "Unsupported RoPE type spiral" in refusal(folder)


@pytest.mark.parametrize("kept", [0, 5, 4000, -1000], ids=["empty", "half a header", "header only", "last bytes gone"])
def test_weights_cut_short(folder: Path, kept: int):
    """A process of its own: reading behind a file's end must be an error, not the end of the process."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    code = "import sys, mlx_realign; from mlx_realign.loading import load; load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"mlx_realign.errors.UserError: --model {folder}: ")


def test_weights_that_are_something_else(folder: Path):
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>" * 100)
    refusal(folder)


def test_no_tokenizer(folder: Path):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer.json; copy it from where the weights came from" in refusal(folder)


def test_a_broken_tokenizer(folder: Path):
    (folder / "tokenizer.json").write_text("{")
    assert refusal(folder).startswith("its tokenizer cannot be read: ")


def test_code_in_the_folder_runs_only_when_allowed(folder: Path):
    (folder / "own.py").write_text("raise RuntimeError('it ran')")
    change_config(folder, model_file="own.py")
    text = refusal(folder)
    assert "it ran" not in text
    assert "--trust-remote-code lets that code run" in text
    assert "it ran" in refusal(folder, trust_remote_code=True)


# ---------------------------------------------------------------------------------------------- dtypes


def blocks(model: Any) -> Any:
    return model.model.layers


def dtypes(model: Any) -> set[mx.Dtype]:
    tensors: Any = tree_flatten(model.parameters())
    return {value.dtype for _, value in tensors}


@pytest.fixture
def half_folder(tiny_model: Callable[..., Any], folder: Path) -> Path:
    """The folder with its weights in bfloat16, as most models come."""
    model = tiny_model("llama")
    model.set_dtype(mx.bfloat16)
    (folder / "model.safetensors").unlink()
    save_model(folder, model)
    return folder


def test_auto_is_float32_on_a_cpu_and_the_models_own_elsewhere(half_folder: Path):
    loaded = load(str(half_folder))
    assert dtypes(loaded.model) == ({mx.float32} if loading.on_cpu() else {mx.bfloat16})
    assert loaded.notes == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_asked_for(half_folder: Path, dtype: str):
    model = load(str(half_folder), dtype=dtype).model
    assert dtypes(model) == {getattr(mx, dtype)}
    original = load_model(half_folder)[0]
    weight, right = (blocks(m)[0].mlp.up_proj.weight.astype(mx.float32) for m in (model, original))
    np.testing.assert_allclose(weight, right, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_model_file_keeps_in_float32_is_not_narrowed(tmp_path: Path, dtype: str):
    """As mlx-lm's converter leaves it: which experts a token takes turns on small differences."""
    model = load(str(write_folder(tmp_path, "deepseek_v3")), dtype=dtype).model
    found: dict[str, mx.array] = dict(tree_flatten(model.parameters()))  # pyright: ignore
    kept = {name: x.dtype for name, x in found.items() if "e_score_correction_bias" in name}
    assert len(kept) == 3 and set(kept.values()) == {mx.float32}
    assert {x.dtype for name, x in found.items() if name not in kept} == {getattr(mx, dtype)}


# ---------------------------------------------------------------------------------------------- quantised weights


@pytest.fixture
def quantized_folder(tiny_model: Callable[..., Any], folder: Path, tmp_path: Path) -> Path:
    """As mlx-community's folders are: packed weights, float scales, `quantization` in the config."""
    model = tiny_model("llama")
    model.set_dtype(mx.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    model, config = quantize_model(model, config, 64, 4)
    target = tmp_path / "quantised"
    target.mkdir()
    save_model(target, model)
    (target / "config.json").write_text(json.dumps(config))
    write_tokenizer(target)
    return target


def test_a_quantised_folder_keeps_its_values_when_dequantised(quantized_folder: Path):
    """On a CPU packed weights are unpacked: to just the values they stood for."""
    packed = load(str(quantized_folder), dtype="float32", cpu_dequantize="never")
    assert loading._has_quantized(packed.model)
    assert packed.notes == []
    unpacked = load(str(quantized_folder), dtype="float32")
    assert loading._has_quantized(unpacked.model) != loading.on_cpu()
    if loading.on_cpu():
        assert "dequantised at load" in unpacked.notes[0]
        assert dtypes(unpacked.model) == {mx.float32}
    np.testing.assert_allclose(unpacked.model(TOKENS), packed.model(TOKENS), atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_gives_the_numbers_of_mlx_lms_converter(folder: Path, tiny_model: Callable[..., Any], bits: int):
    expected, _ = quantize_model(tiny_model("llama"), {}, 64, bits)
    for option in ("never", "auto"):
        loaded = load(str(folder), quantize=bits, cpu_dequantize=option)
        assert loaded.notes[0] == f"base quantised to {bits} bits, groups of 64"
        np.testing.assert_allclose(loaded.model(TOKENS), expected(TOKENS), atol=1e-4)
    unquantised = load(str(folder)).model(TOKENS)
    assert np.abs(np.array(unquantised) - np.array(expected(TOKENS))).max() > 1e-3


def test_quantize_on_a_quantised_model_is_said_to_do_nothing(quantized_folder: Path):
    loaded = load(str(quantized_folder), quantize=8, cpu_dequantize="never")
    assert loaded.notes == ["--quantize 8 has no effect: the model is quantised to 4 bits"]
    assert blocks(loaded.model)[0].mlp.up_proj.bits == 4


def test_quantize_leaves_routers_to_the_models_own_choice(model_folder: Callable[..., Path]):
    """mlx-lm keeps qwen3_moe's routers at 8 bits; 4 would choose other experts."""
    model = load(str(model_folder("qwen3_moe")), quantize=4, cpu_dequantize="never").model
    assert blocks(model)[0].mlp.gate.bits == 8
    assert blocks(model)[0].self_attn.q_proj.bits == 4


# ---------------------------------------------------------------------------------------------- memory

MEASURE = """
import json, resource, sys
import mlx_realign, mlx.core as mx, transformers, mlx_lm
from mlx.utils import tree_flatten
from mlx_realign.loading import load
mx.reset_peak_memory()
model = load(sys.argv[1], **json.loads(sys.argv[2])).model
size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
print(mx.get_peak_memory() / size)
"""


@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16"}, {"quantize": 4}], ids=["", "cast", "quantised"])
def test_weights_are_held_once_while_loading(options: dict[str, Any], tmp_path: Path, tiny_model_dir: Path):
    """A model of 36 MB in 40 layers: read, quantised and cast tensor by tensor."""
    from policy_tools import make_model

    model = make_model("llama", num_hidden_layers=40, hidden_size=192, intermediate_size=768)
    save_model(tmp_path, model)
    change = {"num_hidden_layers": 40, "hidden_size": 192, "intermediate_size": 768}
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    change_config(tmp_path, **change)
    write_tokenizer(tmp_path)
    run = [sys.executable, "-c", MEASURE, str(tmp_path), json.dumps(options)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1.2


def test_gemma_3n_is_refused_for_as_long_as_it_has_two_answers(folder: Path):
    from mlx_lm.models import cache, gemma3n

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 320, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_kv_shared_layers": 2, "sliding_window": 32}
    altup = {"altup_num_inputs": 2, "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0}
    layers = {"laurel_rank": 4, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8}
    rest = {"rope_theta": 1e4, "rope_local_base_freq": 1e4, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-5}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 4}
    text = {**sizes, **heads, **altup, **layers, **rest, **kinds, "max_position_embeddings": 64}
    config = {"model_type": "gemma3n", "text_config": {"model_type": "gemma3n_text", **text}}
    mx.random.seed(0)
    model = gemma3n.Model(gemma3n.ModelArgs.from_dict(config))
    found, expected = model(TOKENS), model(TOKENS, cache=cache.make_prompt_cache(model))
    assert mx.abs(found - expected).max() > 0.1, "mlx-lm is of one mind now: Gemma 3n can be let in"
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    assert "Gemma 3n is not supported" in refusal(folder)


def test_phi_3_small_is_refused_for_as_long_as_its_tokens_see_later_ones(folder: Path):
    from mlx_lm.models import phi3small

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"ff_intermediate_size": 128, "gegelu_limit": 20.0, "layer_norm_epsilon": 1e-5, "vocab_size": 100352}
    config = {"model_type": "phi3small", **sizes, **rest, "dense_attention_every_n_layers": 2}
    mx.random.seed(0)
    model = phi3small.Model(phi3small.ModelArgs.from_dict(config))
    first, other = (model(mx.array([[5, 6, 7, last]]))[0, 0, :100] for last in (8, 9))
    assert mx.abs(first - other).max() > 1e-3, "in mlx-lm a token sees those before it alone now: let phi3small in"
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    assert "Phi-3-small is not supported" in refusal(folder)
