# SPDX-License-Identifier: Apache-2.0
"""Training with --steer: on where gradients are computed and nowhere else; methods that hand over to their commands."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from policy_tools import gap, make_batch, make_model, make_policy, weighed
from train_tools import Run, launch, pair_rows, sft_rows, write_rows

from mlx_realign import capture, config, train, vectors
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy
from mlx_realign.steering import Steer, steer
from mlx_realign.steering.train_with import TrainWith
from mlx_realign.vectors import About, Direction


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return Policy.load(str(tiny_model_dir))


@pytest.fixture(scope="module")
def direction(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random vector behind block 0, as long as the states there."""
    states = capture.collect(policy, [[1, 2, 3]], blocks=[0])[0, 0, 0]
    vector = np.random.default_rng(0).normal(size=len(states))
    vector *= np.linalg.norm(states) / np.linalg.norm(vector)
    path = tmp_path_factory.mktemp("directions") / "d.safetensors"
    about = About(base_model="tiny", base_hash=policy.base_hash)
    vectors.save(Direction({0: vector}, about), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_rows(folder / "train.jsonl", sft_rows(12))
    write_rows(folder / "valid.jsonl", sft_rows(16)[12:])
    write_rows(folder / "pairs.jsonl", pair_rows(4))
    return folder


def run(folder: Path, model: Path, data: Path, *words: object) -> Run:
    return launch(folder, model, data, "--steps", 3, "--eval-every", 3, *words, method="sft")


def test_coefficient_0_is_the_run_without_bit_for_bit(tmp_path, tiny_model_dir, data, direction):
    plain = run(tmp_path / "plain", tiny_model_dir, data)
    nothing = run(tmp_path / "nothing", tiny_model_dir, data, "--steer", f"{direction}:0")
    assert nothing.code == plain.code == 0
    assert nothing.adapter == plain.adapter
    assert nothing.steps == plain.steps


def test_training_is_steered_and_evaluation_is_not(tmp_path, tiny_model_dir, data, direction):
    still = ("--learning-rate", 1e-12)  # the weights stay, so losses can be compared with those of the start
    plain = run(tmp_path / "plain", tiny_model_dir, data, *still)
    steered = run(tmp_path / "steered", tiny_model_dir, data, *still, "--steer", f"{direction}:2")
    far = abs(steered.steps[0]["loss"] - plain.steps[0]["loss"])
    assert far > 0.05
    assert steered.evaluations[0]["eval_loss"] == pytest.approx(plain.evaluations[0]["eval_loss"], abs=1e-5)
    twice = ("--steer", f"{direction}:1,{direction}:1", "--grad-checkpoint")
    both = run(tmp_path / "both", tiny_model_dir, data, *still, *twice)
    assert both.steps[0]["loss"] == pytest.approx(steered.steps[0]["loss"], abs=1e-4)
    assert both.steps[0]["grad_norm"] == pytest.approx(steered.steps[0]["grad_norm"], rel=1e-4)


def test_what_is_added_is_coefficient_times_vector_behind_the_block(tiny_model_dir, direction):
    policy = Policy.load(str(tiny_model_dir))
    vector, tokens = mx.array(vectors.load(direction).vectors[0]), mx.array([[5, 9, 2, 7, 4]])
    inner: Any = policy.model["model"]
    h = inner.layers[0](inner.embed_tokens(tokens), "causal") + 1.5 * vector
    expected = np.array(inner.embed_tokens.as_linear(inner.norm(inner.layers[1](h, "causal"))))
    plain = np.array(policy.model(tokens))
    with_it = TrainWith(policy, f"{direction}:1.5")
    with with_it.gradients():
        assert np.allclose(np.array(policy.model(tokens)), expected, atol=1e-4)
    assert np.array_equal(np.array(policy.model(tokens)), plain)
    with_it.remove()


def test_a_compiled_step_follows_it_on_and_off_without_a_new_trace(direction):
    batch, loss = make_batch([(5, [4, 3]), (3, [6])]), weighed()
    eager, compiled = (make_policy(make_model("llama", num_hidden_layers=1), rank=1) for _ in range(2))
    compiled.compile()
    vector = vectors.load(direction).vectors[0]
    path = direction.with_name("any.safetensors")
    vectors.save(Direction({0: vector}), path)
    ways = [TrainWith(policy, f"{path}:0.5") for policy in (eager, compiled)]
    plain = [policy.gradients(batch, loss)[1] for policy in (eager, compiled)]
    steered = []
    for policy, way in zip((eager, compiled), ways, strict=True):
        with way.gradients():
            steered.append(policy.gradients(batch, loss)[1])
    assert gap(plain[1], plain[0]) < 1e-4 > gap(steered[1], steered[0])
    assert gap(plain[1], steered[1]) > 0.05
    assert gap(compiled.gradients(batch, loss)[1], plain[0]) < 1e-4


def test_a_compiled_step_made_before_follows_what_comes_on_and_outlives_what_is_refused(direction):
    """Steered, twice over, refused while it is traced, and bare again: always the gradients of an eager policy."""
    batch, loss = make_batch([(5, [4, 3]), (3, [6])]), weighed()
    eager, compiled = (make_policy(make_model("llama", num_hidden_layers=1), rank=1) for _ in range(2))
    compiled.compile()
    vector = vectors.load(direction).vectors[0]
    on = Steer(Direction({0: vector}), 0.5)
    more = Steer(Direction({0: vector[::-1]}), 0.5, operator="ablate", positions="generated")
    alike = lambda: gap(compiled.gradients(batch, loss)[1], eager.gradients(batch, loss)[1])  # noqa: E731
    assert alike() < 1e-4
    for steers in ([on], [on, more], [more]):
        with steer(eager, *steers), steer(compiled, *steers):
            assert alike() < 1e-4
    for _ in range(2):
        with steer(compiled, Steer(Direction({0: vector[:5]}))):
            for _ in range(2):
                with pytest.raises(UserError, match="another model's"):
                    compiled.gradients(batch, loss)
        assert alike() < 1e-4


def test_the_policy_is_left_as_it_was(tiny_model_dir, direction, monkeypatch, tmp_path):
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "cache"))
    policy = Policy.load(str(tiny_model_dir))
    layers: Any = policy.model.layers
    kinds = [type(layer) for layer in layers]
    options = {"output": str(tmp_path / "out"), "steps": 1, "lora_rank": 2, "learning_rate": 1e-12}
    before = np.array(policy.model(mx.array([[1, 2, 3]])))
    train(policy, method="sft", data=sft_rows(4), steer=str(direction), **options)
    assert [type(layer) for layer in layers] == kinds
    assert np.allclose(np.array(policy.model(mx.array([[1, 2, 3]]))), before, atol=1e-6)
    with steer(policy, vectors.load(direction)):
        assert not np.allclose(np.array(policy.model(mx.array([[1, 2, 3]]))), before, atol=1e-3)


def test_a_run_goes_on_only_with_the_same_direction(tmp_path, tiny_model_dir, data, direction):
    words = ("--save-every", 1, "--learning-rate", 1e-3)
    run(tmp_path / "out", tiny_model_dir, data, *words, "--steer", direction)
    with pytest.raises(UserError, match="--steer was"):
        run(tmp_path / "out", tiny_model_dir, data, *words, "--steer", f"{direction}:2", "--resume")
    assert run(tmp_path / "out", tiny_model_dir, data, *words, "--steer", direction, "--resume").code == 0


@pytest.mark.parametrize("method", ["dpo", "grpo"])
def test_methods_that_compare_log_probs_refuse_it(method, tmp_path, tiny_model_dir, data, direction):
    words = ("--verifier", "length") if method == "grpo" else ()
    with pytest.raises(UserError, match="--steer is for methods"):
        launch(tmp_path / "out", tiny_model_dir, data / "pairs.jsonl", "--steer", direction, *words, method=method)


def test_a_file_that_is_not_there(tmp_path, tiny_model_dir, data):
    with pytest.raises(UserError, match="no such file"):
        run(tmp_path / "out", tiny_model_dir, data, "--steer", "none.safetensors")


def test_steering_and_abliteration_hand_over_with_their_flags(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('method = "steering"\nmodel = "m"\npositive = "a.txt"\nprefix = false\nblock = 3\n')
    flags = ["--model=m", "--positive=a.txt", "--no-prefix", "--block=3"]
    assert config.handed_over(["--config", str(recipe), "--kl-budget", "2"]) == [
        *("steer", "extract"),
        *flags,
        *("--kl-budget", "2"),
    ]
    assert config.handed_over(["--method=abliteration", "--model", "m"]) == ["ablate", "--model", "m"]
    labelled = ["--method", "abliteration", "--data=d.jsonl", "--model", "m"]
    assert config.handed_over(labelled) == ["ablate", "--positive=d.jsonl", "--model", "m"]
    assert config.handed_over(["--method", "sft", "--config", str(recipe)]) is None
    assert config.handed_over([]) is None
    with pytest.raises(UserError, match="mlx-realign steer extract"):
        config.build("steering", {"model": "m", "data": "d"})
