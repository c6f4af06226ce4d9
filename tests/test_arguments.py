# SPDX-License-Identifier: Apache-2.0
"""What config.json says reaches mlx-lm's model files wherever it is written, or is refused or told."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCAB_SIZE, write_tokenizer
from mlx.utils import tree_map_with_path
from mlx_lm.utils import _get_classes, load_model, save_model
from transformers import CONFIG_MAPPING

from mlx_realign import adapter, arguments, export, selfcheck
from mlx_realign.config import TrainSettings
from mlx_realign.errors import UserError
from mlx_realign.loading import load
from mlx_realign.policy import Policy

TOKENS = mx.array([[5, 9, 200, 3, 17, 42, 8, 100, 7, 61, 30, 2]])
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "eos_token_id": 257,
}
SLIDING = ["sliding_attention", "full_attention"] * 2
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
FLAT = {"rope_theta": 300.0, "rope_type": "default"}
QUARTER = {**FLAT, "partial_rotary_factor": 0.25}

# model type -> (what mlx-lm reads, the same as transformers 5 writes it, the rest)
WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": ({"rope_theta": 300.0}, {"rope_parameters": FLAT}, {}),
    "llama, scaled": (
        {"rope_theta": 300.0, "rope_scaling": {**LLAMA3, "rope_type": "llama3"}},
        {"rope_parameters": {**FLAT, **LLAMA3, "rope_type": "llama3"}, "rope_scaling": None},
        {},
    ),
    "qwen2": ({"rope_theta": 300.0}, {"rope_parameters": FLAT}, {}),
    "starcoder2": ({"rope_theta": 300.0}, {"rope_parameters": FLAT}, {"norm_epsilon": 1e-5}),
    "smollm3": ({"rope_theta": 300.0}, {"rope_parameters": FLAT}, {"no_rope_layer_interval": 2}),
    "phi": (
        {"rope_theta": 300.0, "partial_rotary_factor": 0.25},
        {"rope_parameters": QUARTER},
        {"num_key_value_heads": 4, "layer_norm_eps": 1e-5},
    ),
    "stablelm": (
        {"rope_theta": 300.0, "partial_rotary_factor": 0.25},
        {"rope_parameters": QUARTER},
        {"layer_norm_eps": 1e-5, "use_qkv_bias": False},
    ),
    "gpt_neox": (
        {"rotary_emb_base": 300.0, "rotary_pct": 0.25},
        {"rope_parameters": QUARTER},
        {"layer_norm_eps": 1e-5, "intermediate_size": 256},
    ),
    "exaone4": (
        {"rope_theta": 300.0, "rope_scaling": None},
        {"rope_parameters": FLAT},
        {"tie_word_embeddings": False, "sliding_window": 4, "sliding_window_pattern": "LGLG", "layer_types": SLIDING},
    ),
    "gemma3_text": (
        {"rope_theta": 300.0, "rope_local_base_freq": 20.0, "sliding_window_pattern": 2},
        {
            "rope_parameters": {
                "full_attention": FLAT,
                "sliding_attention": {"rope_theta": 20.0, "rope_type": "default"},
            },
            "layer_types": SLIDING,
        },
        {"sliding_window": 4, "query_pre_attn_scalar": 16},
    ),
    "gemma3": (
        {"text_config": {"rope_theta": 300.0, "rope_local_base_freq": 20.0, "sliding_window_pattern": 2}},
        {
            "text_config": {
                "rope_parameters": {
                    "full_attention": FLAT,
                    "sliding_attention": {"rope_theta": 20.0, "rope_type": "default"},
                },
                "layer_types": SLIDING,
            }
        },
        {"text_config": {**SIZES, "model_type": "gemma3_text", "sliding_window": 4, "query_pre_attn_scalar": 16}},
    ),
}


def config_of(arch: str, *parts: dict[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": arch.split(",")[0], **SIZES}
    for part in parts:
        text = {**config.get("text_config", {}), **part.get("text_config", {})}
        config |= copy.deepcopy(part) | ({"text_config": text} if text else {})
    return config


def make_model(config: dict[str, Any]) -> Any:
    """mlx-lm's own, wide enough that positions matter."""
    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    widen = lambda _, value: value * 2.5 if value.ndim == 2 else value  # noqa: E731
    model.update(tree_map_with_path(widen, model.parameters()))
    model.eval()
    return model


def write(folder: Path, model: Any, config: dict[str, Any]) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("arch", WRITTEN)
def test_what_transformers_5_writes_is_what_mlx_lm_reads(arch: str, tmp_path: Path):
    explicit, saved, rest = WRITTEN[arch]
    model = make_model(config_of(arch, rest, explicit))
    folder = write(tmp_path / "model", model, config_of(arch, rest, saved))
    loaded = load(str(folder), dtype="float32")
    np.testing.assert_allclose(loaded.model(TOKENS), model(TOKENS), atol=1e-4)
    try:
        unread = load_model(folder)[0](TOKENS)
    except (TypeError, ValueError, IndexError):
        return  # mlx-lm asks for what is written elsewhere, or cannot run without it
    assert np.abs(np.array(unread) - np.array(model(TOKENS))).max() > 0.01, "mlx-lm reads it now"


@pytest.mark.parametrize("arch", ["llama", "stablelm"])  # mlx-lm reads the one wrongly, and the other not at all
def test_a_model_fused_from_what_transformers_5_writes_is_read_by_mlx_lm_alone(arch: str, tmp_path: Path):
    explicit, saved, rest = WRITTEN[arch]
    model = make_model(config_of(arch, rest, explicit))
    folder = str(write(tmp_path / "model", model, config_of(arch, rest, saved)))
    policy = Policy.from_settings(TrainSettings(model=folder, data="unread", dtype="float32"))
    policy.model.update(tree_map_with_path(lambda _, value: value + 0.02, policy.model.trainable_parameters()))
    adapter.save(policy.model, tmp_path / "adapter", base_model=folder)
    assert export.main([str(tmp_path / "adapter"), "--to", "fused", "--output", str(tmp_path / "fused")]) == 0
    moved = policy.model(TOKENS)
    assert np.abs(np.array(moved) - np.array(model(TOKENS))).max() > 0.1
    np.testing.assert_allclose(load_model(tmp_path / "fused")[0](TOKENS), moved, atol=1e-3)


def test_the_angle_of_a_position_is_the_one_config_json_says(tmp_path: Path):
    """The last of 8 pairs of a head turns by theta^(-7/8) a position."""
    config = config_of("llama", {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}})
    model: Any = load(str(write(tmp_path / "model", make_model(config), config)), dtype="float32").model
    x = mx.zeros((1, 1, 2, 16)).at[..., 7].add(1.0)  # pairs are (i, i + 8)
    turned = np.array(model.layers[0].self_attn.rope(x, offset=99))[0, 0, 1]
    angle = 100 * 5000.0 ** (-7 / 8)
    assert turned[7] == pytest.approx(math.cos(angle), abs=1e-5)
    assert turned[15] == pytest.approx(math.sin(angle), abs=1e-5)


def complete(config: dict[str, Any]) -> list[str]:
    return arguments.complete(config, *_get_classes(config))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 300.0}
NESTED = {"full_attention": FLAT, "sliding_attention": {"rope_theta": 20.0, "rope_type": "default"}}
LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("arch", "part", "keys"),
    [
        ("llama", {"rope_theta": 1e4, "rope_parameters": FLAT}, {"rope_theta": "rope_theta"}),
        ("qwen2", {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default"}}, {"rope_theta": "rope_theta"}),
        ("llama", {"rope_theta": 1e4, "rope_parameters": FLAT, "rope_scaling": LINEAR}, {"rope_theta": "rope_theta"}),
        ("llama", {"rope_theta": 1e4, "rope_scaling": {**LINEAR, "rope_theta": 300.0}}, {"rope_theta": "rope_theta"}),
        (
            "stablelm",
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_parameters": QUARTER},
            {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"},
        ),
        (
            "gpt_neox",
            {"rotary_emb_base": 1e4, "rotary_pct": 0.5, "rope_parameters": QUARTER},
            {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
        ),
    ],
)
def test_of_rope_settings_that_contradict_one_another_those_of_transformers_are_taken(
    arch: str, part: dict[str, Any], keys: dict[str, str]
):
    config = config_of(arch, part)
    right = CONFIG_MAPPING[arch].from_dict(copy.deepcopy(config)).rope_parameters
    told = {key for key, there in keys.items() if part[key] != right[there]}
    notes = complete(config)
    assert {key: config[key] for key in keys} == {key: right[there] for key, there in keys.items()}
    assert len(notes) == len(told)
    assert all(any(note.startswith(f"config.json says {key} {part[key]}, and") for note in notes) for key in told)


def test_rope_settings_of_each_kind_of_layer_that_contradict_others_are_those_of_transformers():
    config = config_of("gemma3_text", {"rope_theta": 1e4, "rope_local_base_freq": 1e4, "rope_parameters": NESTED})
    config |= {"layer_types": SLIDING, "sliding_window": 4}
    right = CONFIG_MAPPING["gemma3_text"].from_dict(copy.deepcopy(config)).rope_parameters
    notes = [note for note in complete(config) if "among its rope settings" in note]
    assert config["rope_theta"] == right["full_attention"]["rope_theta"] == 300.0
    assert config["rope_local_base_freq"] == right["sliding_attention"]["rope_theta"] == 20.0
    assert len(notes) == 2


def test_a_model_file_that_looks_into_rope_parameters_itself_has_a_setting_for_them():
    text = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "model_type": "muse_spark_text"}
    assert complete({"model_type": "muse_spark", "text_config": text}) == []


def test_a_text_config_of_null_is_none(tmp_path: Path):
    config = config_of("llama", {"rope_theta": 300.0}) | {"text_config": None}
    folder = write(tmp_path / "model", make_model(config), config)
    assert load(str(folder)).notes == []


def test_what_config_json_leaves_to_defaults_that_differ_is_told_with_both():
    """Falcon H1's multipliers are 1 in transformers, and in mlx-lm those of one published model."""
    notes = {note.split()[4].rstrip(":"): note for note in complete(config_of("falcon_h1", {"key_multiplier": 0.5}))}
    assert "it is [1.0, 1.0] as in transformers; mlx-lm alone takes [0.88" in notes["mlp_multipliers"]
    assert "it is 1.0 as in transformers; mlx-lm alone takes 1.25" in notes["ssm_in_multiplier"]
    assert "key_multiplier" not in notes


def test_names_that_transformers_changed_are_found():
    """Qwen3-MoE's experts are `num_local_experts` there; infinity is an object."""
    moe = {"num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "rope_parameters": FLAT}
    config = config_of("qwen3_moe", moe, {"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    complete(config)
    assert config["num_experts"] == 8
    assert config["time_step_limit"] == [0.0, math.inf]


@pytest.mark.parametrize(
    ("arch", "part", "said"),
    [
        ("glm", {"rope_parameters": QUARTER}, "partial_rotary_factor 0.25, and mlx-lm's glm has no setting"),
        ("starcoder2", {"rope_parameters": YARN}, "rope_type yarn, and mlx-lm's starcoder2 has no setting"),
        ("qwen3_moe", {"rope_parameters": YARN}, "rope_type yarn, and mlx-lm's qwen3_moe has no setting"),
        ("gptj", {"rope_parameters": FLAT}, "rope_theta 300.0, and mlx-lm's gptj has no setting"),
        (
            "llama",
            {"rope_parameters": {"full_attention": FLAT, "sliding_attention": {**FLAT, "rope_theta": 20.0}}},
            "differ between full and sliding layers, and mlx-lm's llama has one setting",
        ),
        ("gemma3_text", {"layer_types": SLIDING[:2] + ["full_attention"]}, "layer_types has no regular pattern"),
    ],
)
def test_what_cannot_be_passed_on_is_refused(
    arch: str, part: dict[str, Any], said: str, tmp_path: Path, tiny_model_dir: Path
):
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps(config_of(arch, part)))
    with pytest.raises(UserError, match=f"^--model {folder}: cannot be loaded: .*{said}"):
        load(str(folder))


def test_notes_reach_the_user(tmp_path: Path):
    config = config_of("llama", {"rope_theta": 300.0, "hidden_act": "gelu"})
    folder = write(tmp_path / "model", make_model(config), config)
    assert load(str(folder)).notes[0].startswith("config.json says hidden_act gelu, which mlx-lm's llama does not read")


GRIFFIN = {"conv1d_width": 4, "logits_soft_cap": 30.0, "attention_window_size": 8, "attention_bias": False}
INDEXED = {
    **{"moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "q_lora_rank": 64},
    **{"qk_rope_head_dim": 32, "o_groups": 2, "o_lora_rank": 32, "sliding_window": 8, "index_n_heads": 4},
    **{"index_head_dim": 32, "index_topk": 8, "compress_ratios": [0, 4, 0, 4], "candidate_topk_blocks": 4},
    **{"candidate_block_size": 4, "hc_mult": 2, "hc_sinkhorn_iters": 4, "tie_word_embeddings": False},
}
MIXED = {"layer_types": ["conv_mixer", "sliding_attention", "full_attention", "conv_mixer"], "sliding_window": 8}


@pytest.mark.parametrize(
    ("arch", "part", "said"),
    [
        (
            "recurrent_gemma",
            {**GRIFFIN, "rope_theta": 1e4, "block_types": ["recurrent", "attention"]},
            "recurrent_gemma models cannot run here: .* does not work with this MLX. Take Gemma 3 .*_no_grad",
        ),
        (
            "gear",
            MIXED,
            "its tokenizer cannot be read: transformers, which .* does not take its layer_types, .*Take another",
        ),
        (
            "bitnet",
            {"num_key_value_heads": 4},
            "bitnet models cannot run here: .*by a kernel for Apple GPUs.* Take a Mac, .*RuntimeError: .*Metal",
        ),
        (
            "deepseek_v41",
            INDEXED,
            "deepseek_v41 models cannot be trained here: MLX has no gradient .*take DeepSeek V3 .*gather_axis",
        ),
    ],
)
def test_an_architecture_that_cannot_work_ends_in_one_line(arch: str, part: dict[str, Any], said: str, tmp_path: Path):
    """All but bitnet on Metal; where one works one day, it comes off the list in the README."""
    if arch == "bitnet" and mx.metal.is_available():
        pytest.skip("Metal runs it")
    config = config_of(arch, part)
    folder = write(tmp_path / "model", make_model(config), config)
    with pytest.raises(UserError, match=f"^--model {folder}: {said}") as caught:
        selfcheck.run(Policy.from_settings(TrainSettings(model=str(folder), lora_rank=2)))
    assert "\n" not in str(caught.value)


def test_a_model_file_that_ends_the_process_is_one_line(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
):
    """mlx-lm's olmo prints what to install and exits; OLMo 2 is another file."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps(config_of("olmo", {})))
    with pytest.raises(
        UserError, match=f"^--model {folder}: cannot be loaded: .* take OLMo 2 or OLMo 3.*To run olmo install ai2-olmo"
    ):
        load(str(folder))
    assert capsys.readouterr().out == ""
