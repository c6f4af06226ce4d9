# SPDX-License-Identifier: Apache-2.0
"""Every kind of policy goes through the loop: full, quantised, DoRA, rsLoRA, checkpointed, started from an adapter."""

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load as mlx_lm_load
from train_tools import launch, pair_rows, sft_rows, tensors, write_rows

from mlx_realign import UserError, config
from mlx_realign.policy import Policy
from mlx_realign.progress import Reporter
from mlx_realign.train import run

LN2 = math.log(2)
TOKENS = mx.array([[256, 7, 42, 99, 257, 3, 200, 5]])


@pytest.fixture
def pairs(tmp_path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", pair_rows(6))


def reference_of(row: dict[str, float]) -> float:
    """Mean reference log-prob of chosen, from what a row of metrics says: reward = beta (policy - reference)."""
    return row["logps/chosen"] - row["rewards/chosen"] / 0.1


@pytest.mark.parametrize(
    "words",
    [
        ("--full", "--learning-rate", 3e-4),
        ("--dora",),
        ("--rslora",),
        ("--grad-checkpoint",),
        ("--quantize", 4),
        ("--quantize", 4, "--cpu-dequantize", "never"),
        ("--dtype", "bfloat16"),
        ("--optimizer", "lion", "--learning-rate", 2e-4),
        ("--lora-targets", "q_proj,embed_tokens", "--lora-layers", 1),
    ],
    ids=lambda words: "_".join(str(word).removeprefix("--") for word in words),
)
def test_dpo_starts_at_ln_2_learns_and_keeps_its_reference(tiny_model_dir, tmp_path, pairs, words):
    """One batch holds all rows, so every step's mean is over the same rows, and their reference must stay."""
    run = launch(tmp_path / "out", tiny_model_dir, pairs, "--batch-size", 6, "--epochs", 8, *words)
    half = "--dtype" in words
    assert run.code == 0
    assert abs(run.steps[0]["loss"] - LN2) <= (1e-2 if half else 1e-6)
    assert run.steps[-1]["loss"] < 0.6 and run.steps[-1]["rewards/accuracies"] == 1.0
    for row in run.steps:
        assert reference_of(row) == pytest.approx(reference_of(run.steps[0]), rel=2e-2 if half else 1e-5)


def test_a_full_fine_tune_is_a_model_folder(tiny_model_dir, tmp_path, pairs):
    words = ("--full", "--steps", 3, "--learning-rate", 1e-3)
    run = launch(tmp_path / "out", tiny_model_dir, pairs, *words)
    model, tokenizer = mlx_lm_load(str(run.folder / "model"))[:2]
    before = Policy.load(str(tiny_model_dir)).model(TOKENS)
    assert mx.abs(model(TOKENS) - before).max().item() > 1e-3  # type: ignore
    ours = Policy.load(str(run.folder / "model")).model
    assert mx.allclose(model(TOKENS), ours(TOKENS), rtol=1e-4, atol=1e-4)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False).startswith("<|im_start|>")
    config = json.loads((run.folder / "model" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["torch_dtype"] == "float32"
    assert json.loads((run.folder / "config.json").read_text())["settings"]["full"] is True
    assert not (run.folder / "adapters.safetensors").exists()
    with pytest.raises(UserError, match="holds a run already"):
        launch(tmp_path / "out", tiny_model_dir, pairs, *words)


def test_a_full_fine_tune_with_a_tenth_of_the_rate(tiny_model_dir, tmp_path, pairs):
    words = ("--method", "dpo", "--model", tiny_model_dir, "--data", pairs, "--steps", 1, "--dry-run", "--json")
    rates = []
    for kind in ((), ("--full",)):
        settings = [str(word) for word in (*words, *kind, "--output", tmp_path / "out")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "cache"))
            found = run(*config.parse(settings), reporter=Reporter(as_json=True))
        rates.append(found["learning_rate"])
    assert rates[1] == pytest.approx(rates[0] / 10)


def test_a_quantised_model_is_not_trained_in_full(tiny_model_dir, tmp_path, pairs):
    from mlx_lm import convert

    convert(str(tiny_model_dir), str(tmp_path / "quantised"), quantize=True, q_bits=4, q_group_size=32)
    words = ("--full", "--steps", 1)
    with pytest.raises(UserError, match="--full: the weights are quantised and cannot be trained"):
        launch(tmp_path / "no", tmp_path / "quantised", pairs, *words, "--cpu-dequantize", "never")
    if mx.default_device().type == mx.DeviceType.cpu:  # there it is dequantised at load
        run = launch(tmp_path / "out", tmp_path / "quantised", pairs, *words)
        assert "quantization" not in json.loads((run.folder / "model" / "config.json").read_text())
        assert mlx_lm_load(str(run.folder / "model"))[0](TOKENS).shape == (1, 8, 320)


def test_sft_on_conversations_trains_every_assistant_turn(tiny_model_dir, tmp_path):
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "See you.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    data = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}] * 2)
    run = launch(tmp_path / "out", tiny_model_dir, data, "--steps", 30, "--learning-rate", 1e-2, method="sft")
    facts = json.loads((run.folder / "config.json").read_text())["facts"]
    assert facts["trained_tokens"] == 2 * (len("Hello.") + 1 + len("See you.") + 1)  # bytes, and two ends of turn
    assert run.steps[-1]["loss"] < 0.3 and run.steps[-1]["mean_token_accuracy"] == 1.0


def test_a_second_run_starts_from_an_adapter_and_measures_from_there(tiny_model_dir, tmp_path, pairs):
    data = write_rows(tmp_path / "sft.jsonl", sft_rows(6))
    first = launch(tmp_path / "sft", tiny_model_dir, data, "--epochs", 4, "--dora", method="sft")
    words = ("--batch-size", 6, "--steps", 4, "--adapter", first.folder)
    init = launch(tmp_path / "init", tiny_model_dir, pairs, *words)
    assert abs(init.steps[0]["loss"] - LN2) <= 1e-6
    base = launch(tmp_path / "base", tiny_model_dir, pairs, *words, "--reference", "base")
    assert abs(base.steps[0]["loss"] - LN2) > 1e-3
    assert base.steps[0]["logps/chosen"] == pytest.approx(init.steps[0]["logps/chosen"], rel=1e-5)
    fresh = launch(tmp_path / "fresh", tiny_model_dir, pairs, "--batch-size", 6, "--steps", 1)
    assert reference_of(base.steps[0]) == pytest.approx(reference_of(fresh.steps[0]), rel=1e-5)
    assert tensors(init.folder).keys() == tensors(first.folder).keys()


def test_a_checkpoint_serves_as_start_of_another_run(tiny_model_dir, tmp_path, pairs):
    first = launch(tmp_path / "first", tiny_model_dir, pairs, "--batch-size", 6, "--steps", 3, "--save-every", 1)
    middle = first.folder / "checkpoints" / "step-000002"
    second = launch(tmp_path / "second", tiny_model_dir, pairs, "--batch-size", 6, "--steps", 1, "--adapter", middle)
    assert second.steps[0]["logps/chosen"] == pytest.approx(first.steps[2]["logps/chosen"], rel=1e-5)
