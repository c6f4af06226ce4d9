# SPDX-License-Identifier: Apache-2.0
"""steer export: what stock mlx-lm makes of the folder is the steered model; what no weight can say is refused."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import model_config, write_model_folder, write_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model, save_model
from policy_tools import EXTRAS, make_model
from steer_tools import refused, run

from mlx_realign import capture, vectors
from mlx_realign.data import encode_prompt
from mlx_realign.policy import Policy
from mlx_realign.steering import Condition, Schedule, Steer, export, steer
from mlx_realign.steering.export import why_not
from mlx_realign.vectors import About, Direction

TOKENS = mx.array([[5, 9, 2, 7, 4, 11, 3]])
STARCODER2 = {"num_hidden_layers": 2, "norm_epsilon": 1e-5}


def write_folder(folder: Path, arch: str, bits: int | None = None) -> Path:
    """A model folder of a tiny random model, quantised or not."""
    extra = EXTRAS.get(arch, {}) | (STARCODER2 if arch == "starcoder2" else {})
    config = model_config("llama") | {"model_type": arch} | extra
    model = make_model(arch, **(extra or {"tie_word_embeddings": True}))
    if bits:
        model, config = quantize_model(model, config, group_size=32, bits=bits)
    folder.mkdir(parents=True)
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


def write_direction(path: Path, policy: Policy, blocks: list[int], **about: Any) -> Path:
    """Random vectors, half as long as the states of their blocks."""
    rng = np.random.default_rng(3)
    found = {}
    for block in blocks:
        state = capture.collect(policy, [[1, 2, 3]], blocks=[block])[0, 0, 0]
        vector = rng.normal(size=len(state))
        found[block] = 0.5 * np.linalg.norm(state) * vector / np.linalg.norm(vector)
    base = {"base_model": policy.name, "base_hash": policy.base_hash}
    vectors.save(Direction(found, About(**base, **about)), path)
    return path


def log_probs(model: Any) -> np.ndarray:
    logits = np.array(model(TOKENS).astype(mx.float32)).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("arch", "bits", "what"),
    [
        ("llama", None, "mlp_bias"),
        ("llama", 4, "mlp_bias"),
        ("granite", None, "mlp_bias"),  # which halves what its layers add
        ("starcoder2", None, "its biases moved"),
        ("gpt_oss", None, "its biases moved"),  # a bias of every expert
    ],
)
def test_stock_mlx_lm_runs_the_folder_as_the_steered_model(tmp_path, capsys, arch, bits, what):
    source = write_folder(tmp_path / "model", arch, bits)
    policy = Policy.load(str(source))
    path = write_direction(tmp_path / "d.safetensors", policy, [0, 1])
    words = ("--to", "mlx-lm", "--output", tmp_path / "out")
    told = run(capsys, "export", "--steer", f"{path}:1.5,{path}:0.5", *words)
    assert what in told and "verified on random tokens" in told
    stock, _ = mlx_lm.load(str(tmp_path / "out"))  # pyright: ignore[reportAssignmentType]
    with steer(policy, vectors.load(path), coefficient=2.0):
        expected = log_probs(policy.model)
    moved = np.abs(expected - log_probs(policy.model)).max()
    assert np.abs(log_probs(stock) - expected).max() < 1e-4 * max(1, moved)
    assert moved > 0.1
    if bits:  # the packed weights are those of the source
        assert any("scales" in module for _, module in stock.named_modules())
    text = mlx_lm.generate(stock, policy.tokenizer, encode_prompt("Hi", policy.tokenizer), max_tokens=3)
    assert isinstance(text, str)


def test_a_bfloat16_model_keeps_its_dtype(tmp_path, capsys):
    source = write_folder(tmp_path / "model", "llama")
    held = mx.load(str(source / "model.safetensors"))
    assert isinstance(held, dict)
    mx.save_safetensors(str(source / "model.safetensors"), {k: v.astype(mx.bfloat16) for k, v in held.items()})
    half = Policy.load(str(source), dtype="bfloat16")
    path = write_direction(tmp_path / "d.safetensors", half, [1])
    words = ("--dtype", "bfloat16", "--to", "mlx-lm", "--output", tmp_path / "out")
    assert "verified" in run(capsys, "export", "--steer", path, *words)
    stock, _ = mlx_lm.load(str(tmp_path / "out"))  # pyright: ignore[reportAssignmentType]
    assert {value.dtype for _, value in tree_flatten(stock.parameters())} == {mx.bfloat16}  # pyright: ignore
    assert stock(TOKENS).dtype == mx.bfloat16


def test_weights_are_linked_and_listed_or_copied(tmp_path, capsys):
    source = write_folder(tmp_path / "model", "llama")
    path = write_direction(tmp_path / "d.safetensors", Policy.load(str(source)), [1])
    for name, words in (("linked", ()), ("copied", ("--copy",))):
        run(capsys, "export", "--steer", path, "--to", "mlx-lm", "--output", tmp_path / name, *words)
        first, second = sorted((tmp_path / name).glob("model-*.safetensors"))
        assert first.samefile(source / "model.safetensors") == (name == "linked")
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())["weight_map"]
        tensors = {file.name: set(mx.load(str(file))) for file in (first, second)}
        assert index == {tensor: file for file, held in tensors.items() for tensor in held}
        biases = {key: float(mx.abs(value).max()) for key, value in mx.load(str(second)).items()}  # pyright: ignore
        assert [key for key, size in biases.items() if size] == ["model.layers.1.mlp.down_proj.bias"]
        assert json.loads((tmp_path / name / "config.json").read_text())["mlp_bias"] is True


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3_text"])
def test_a_vector_before_block_0_is_an_adapter_on_the_embeddings(tmp_path, capsys, arch):
    """Also where there is no bias. A head tied to the embedding shifts all logits alike; gemma scales embeddings."""
    source = write_model_folder(tmp_path / "model", arch)
    policy = Policy.load(str(source))
    path = write_direction(tmp_path / "d.safetensors", policy, [-1])
    told = run(capsys, "export", "--steer", path, "--to", "mlx-lm", "--output", tmp_path / "out")
    assert f"--model {source} --adapter-path {tmp_path / 'out'}" in told
    stock, _ = mlx_lm.load(str(source), adapter_path=str(tmp_path / "out"))  # pyright: ignore[reportAssignmentType]
    with steer(policy, vectors.load(path)):
        expected = log_probs(policy.model)
    assert np.abs(log_probs(stock) - expected).max() < 2e-4
    assert np.abs(expected - log_probs(policy.model)).max() > 0.1


@pytest.mark.parametrize("arch", ["qwen3", "olmo2", "phi3"])
def test_architectures_without_such_a_bias_are_told_so(tmp_path, capsys, arch):
    """olmo2 has the flag, but a norm between the layer and the stream."""
    source = write_model_folder(tmp_path / "model", arch)
    path = write_direction(tmp_path / "d.safetensors", Policy.load(str(source)), [1])
    told = refused(capsys, "export", "--steer", path, "--to", "mlx-lm", "--output", tmp_path / "out")
    assert f"{arch} models have no bias that arrives behind block 1 unchanged" in told and "\n" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [None, 4])
def test_ablation_at_all_blocks_is_an_adapter_that_keeps_layers_from_writing_it(tmp_path, capsys, bits):
    source = write_folder(tmp_path / "model", "llama", bits)
    policy = Policy.load(str(source))
    path = write_direction(tmp_path / "d.safetensors", policy, [0, 1], operator="ablate")
    words = ("export", "--steer", path, "--to", "mlx-lm", "--output", tmp_path / "out")
    told = refused(capsys, *words)
    assert "not the same operation" in told and "mlx-realign ablate" in told and "--force" in told
    assert not (tmp_path / "out").exists(), "it moves log-probs by most of what the steering moves them"
    told = run(capsys, *words, "--force")
    assert "on the 4 layers" in told and "not the same operation" in told and "verified" in told
    stock, _ = mlx_lm.load(str(source), adapter_path=str(tmp_path / "out"))  # pyright: ignore[reportAssignmentType]
    inner: Any = stock["model"]
    h = inner.embed_tokens(TOKENS)
    for block, layer in enumerate(inner.layers):
        wrote = np.array(layer(h, "causal") - h).astype(np.float64)
        assert np.abs(wrote @ vectors.load(path).unit(block)).max() < 1e-4 * np.abs(wrote).max()
        h = layer(h, "causal")
    told = refused(capsys, "export", "--steer", path, "--to", "mlx-lm", "--output", tmp_path / "x", "--blocks", "1")
    assert "only at all positions of all blocks" in told


def test_gguf_is_read_back_as_what_was_steered_with(tmp_path, capsys):
    source = write_folder(tmp_path / "model", "llama")
    policy = Policy.load(str(source))
    path = write_direction(tmp_path / "d.safetensors", policy, [0, 1])
    told = run(
        capsys, "export", "--steer", f"{path}:3", "--blocks", "1", "--to", "gguf", "--output", tmp_path / "d.gguf"
    )
    assert "blocks 1" in told and "verified" in told
    again = vectors.load(tmp_path / "d.gguf", policy=policy)
    assert again.blocks == [1] and np.allclose(again.vectors[1], 3 * vectors.load(path).vectors[1])
    words = ("--steer", tmp_path / "d.gguf", "--to", "mlx-lm", "--output", tmp_path / "out")
    assert "mlp_bias" in run(capsys, "export", *words)


@pytest.mark.parametrize(("to", "output", "broken"), [("gguf", "d.gguf", "steer"), ("mlx-lm", "out", "bias_folder")])
def test_an_export_that_does_something_else_is_gone_again(tmp_path, capsys, monkeypatch, to, output, broken):
    path = write_direction(
        tmp_path / "d.safetensors", Policy.load(str(write_folder(tmp_path / "model", "llama"))), [0, 1]
    )
    right = getattr(export, broken)

    def wrong(policy: Policy, what: Any, *rest: Any, **flags: Any) -> Any:
        """What is read back, or what becomes a bias, twice as long."""
        if broken == "bias_folder":
            return right(policy, {block: 2 * vector for block, vector in what.items()}, *rest, **flags)
        return right(policy, Steer(what, 2.0) if isinstance(what, Direction) else what)

    monkeypatch.setattr(export, broken, wrong)
    told = refused(capsys, "export", "--steer", path, "--blocks", "1", "--to", to, "--output", tmp_path / output)
    assert "does not run as it should, and is gone again: largest difference" in told and "\n" not in told
    assert not (tmp_path / output).exists()


def test_what_is_no_constant_is_refused_with_its_reason():
    direction = Direction({0: np.ones(4), 1: np.ones(4)})
    reasons = {
        "depends on the state": Steer(direction, operator="ablate"),
        "acts on positions last": Steer(direction, positions="last"),
        "its schedule is linear": Steer(direction, schedule=Schedule("linear", 4)),
        "has a condition": Steer(direction, condition=Condition(direction, 0, 0.5)),
    }
    for reason, one in reasons.items():
        assert reason in str(why_not(one))
    assert why_not(Steer(direction, 2.0)) is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--to", "mlx-lm"), "--steer is needed"),
        (("--steer", "d.safetensors", "--to", "mlx-lm", "--operator", "clamp", "--low", "1"), "cannot be exported"),
        (("--steer", "d.safetensors", "--to", "mlx-lm", "--blocks=-1,1"), "block -1 is said by an adapter"),
        (("--steer", "d.safetensors", "--to", "gguf"), "ends in .gguf"),
        (("--steer", "d.safetensors", "--to", "mlx-lm", "--adapter", "x"), "--adapter"),
        (("--steer", "d.safetensors", "--to", "mlx-lm", "--output", "model"), "exists already"),
        (("--steer", "d.safetensors", "--to", "onnx"), "--to: expected one of mlx-lm, gguf"),
    ],
)
def test_wrong_words_get_one_line(tmp_path, capsys, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    policy = Policy.load(str(write_folder(tmp_path / "model", "llama")))
    write_direction(tmp_path / "d.safetensors", policy, [-1, 0, 1])
    output = () if "--output" in words else ("--output", "out")
    told = refused(capsys, "export", *words, *output)
    assert expected in told and "\n" not in told and not Path("out").exists()
