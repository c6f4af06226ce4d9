# SPDX-License-Identifier: Apache-2.0
"""The load-time check takes the fast ways where they are right, and only there: each is broken once to be refused."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import ARCHITECTURES
from mlx.utils import tree_flatten
from policy_tools import ALL, HYBRIDS, make_model, make_policy

from mlx_realign import adapter_layers, forward, prompt_caches, selfcheck
from mlx_realign.errors import UserError
from mlx_realign.kernels import token_scores
from mlx_realign.policy import Policy

EVEN = {  # prompts of one length only
    "mamba2": "with padding its states would be others",
    "lfm2": "with padding its states would be others",
    "gemma2": "with padding the model's code stops there (ValueError: [broadcast_shapes]",
}


def exactness(finding: str) -> float:
    assert finding.startswith("exact to "), finding
    return float(finding.removeprefix("exact to "))


@pytest.mark.parametrize("arch", ALL)
def test_every_architecture_passes_with_the_way_expected_of_it(arch: str):
    policy = make_policy(arch)
    forward.checkpoint_layers(policy.model)
    checks = selfcheck.run(policy)
    assert policy.sharing and policy.even == (arch in EVEN)
    assert policy.body.whole == (arch == "llama4_text")
    assert all(hasattr(type(layer), "checkpointed_from") for layer in forward.layers_of(policy.model))
    expected_notes = 1 if arch in EVEN or arch == "llama4_text" else 0
    assert len(checks.notes) == expected_notes
    assert all("\n" not in note for note in checks.notes)
    if arch in EVEN:
        assert EVEN[arch] in checks.notes[0]
    assert exactness(checks.results["shared_prompts"]) <= 1e-4
    if arch != "llama4_text":
        assert exactness(checks.results["chunked_head"]) <= 1e-4
    assert exactness(checks.results["checkpointed_layers"]) <= 1e-4
    assert checks.results["adapter_off"] == "exact"


def test_the_common_architectures_are_all_here():
    assert set(HYBRIDS) <= set(ARCHITECTURES)
    assert {"llama", "qwen2", "qwen3", "gemma3_text", "phi3", "mistral", "qwen3_moe", "olmoe", "olmo2"} <= set(ALL)


@pytest.mark.parametrize("kind", ["dynamic", "llama3", "linear"])
def test_scaled_positions(kind: str):
    """A dynamic RoPE makes a prompt's keys depend on what comes behind it, so it falls back; the others share."""
    scaling = {"rope_type": kind, "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 64}
    policy = make_policy(make_model("llama", rope_scaling=scaling))
    checks = selfcheck.run(policy)
    assert policy.sharing == (kind != "dynamic")
    assert ("how long the whole text is" in checks.results["shared_prompts"]) == (kind == "dynamic")
    assert np.isfinite(np.array(policy.scores(selfcheck.probe(policy.vocabulary)).logps)).all()


@pytest.mark.parametrize("arch", ["mistral", "gemma3_text", "cohere2", "gpt_oss"])
def test_a_mask_that_forgets_the_window_is_found(arch: str, monkeypatch: pytest.MonkeyPatch):
    """Even though the probe's prompts are shorter than any real window: windows shrink for the check, and come back."""
    model = make_model(arch, sliding_window=4096)
    right = prompt_caches._mask
    monkeypatch.setattr(prompt_caches, "_mask", lambda start, n, pad, window, array: right(start, n, pad, None, array))
    policy = make_policy(model)
    checks = selfcheck.run(policy)
    assert not policy.sharing
    assert "differs by" in checks.results["shared_prompts"]
    assert getattr(model, "args").sliding_window == 4096  # noqa: B009
    monkeypatch.undo()
    selfcheck.run(policy)
    assert policy.sharing


def broken_offset(self: Any, recorder: Any, rows: mx.array) -> None:
    right_reader(self, recorder, rows)
    self.offset = self.offset + 1


def no_gradient_to_prompts(self: Any, recorder: Any, rows: mx.array) -> None:
    right_reader(self, recorder, rows)
    self.kv = tuple(mx.stop_gradient(x) for x in self.kv)


def wrong_rows(self: Any, recorder: Any, rows: mx.array) -> None:
    right_reader(self, recorder, mx.zeros_like(rows))


right_reader = prompt_caches.PromptReader.__init__


@pytest.mark.parametrize("fault", [broken_offset, no_gradient_to_prompts, wrong_rows])
def test_a_wrong_shared_forward_is_found(fault: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prompt_caches.PromptReader, "__init__", fault)
    policy = make_policy("llama")
    checks = selfcheck.run(policy)
    assert not policy.sharing
    assert "differs by" in checks.notes[0]


def test_a_wrong_head_is_found_and_whole_logits_are_used(monkeypatch: pytest.MonkeyPatch):
    right = token_scores._online

    def slope_too_long(*args: Any) -> list[mx.array]:
        *rows, slope = right(*args)
        return [*rows, slope * 1.05]

    monkeypatch.setattr(token_scores, "_online", slope_too_long)
    policy = make_policy("llama")
    checks = selfcheck.run(policy)
    assert policy.body.whole
    assert "differs by" in checks.results["chunked_head"]
    assert policy.sharing  # checked against the way that is right
    assert exactness(checks.results["shared_prompts"]) <= 1e-4


class TwoHeads(nn.Module):
    """Its logits are the mean of two heads: no single module can stand for it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.other = inner, nn.Linear(64, 320)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        hidden = self.inner.model(tokens, cache)
        return 0.5 * (self.inner.lm_head(hidden) + self.other(hidden))

    @property
    def layers(self) -> Any:
        return self.inner.layers


def test_a_head_made_of_two_is_not_taken_apart():
    policy = make_policy(TwoHeads(make_model("qwen2")))
    checks = selfcheck.run(policy)
    assert policy.body.whole
    assert len(checks.notes) == 1
    assert exactness(checks.results["shared_prompts"]) <= 1e-4


def test_wrong_checkpointing_is_found_and_switched_off(monkeypatch: pytest.MonkeyPatch):
    """Keys and values that reach a layer by the back door get no gradient from a recomputed one."""
    right = forward._copies
    monkeypatch.setattr(forward, "_copies", lambda caches, kv: right(caches, [mx.stop_gradient(x) for x in kv]))
    policy = make_policy("llama")
    forward.checkpoint_layers(policy.model)
    checks = selfcheck.run(policy)
    assert "gradient checkpointing is off: " in checks.notes[0]
    assert not any(hasattr(type(layer), "checkpointed_from") for layer in forward.layers_of(policy.model))
    assert policy.sharing


def test_an_adapter_that_acts_when_off_stops_everything(monkeypatch: pytest.MonkeyPatch):
    policy = make_policy("llama")
    monkeypatch.setattr("mlx_realign.adapter.set_enabled", lambda model, on: None)
    with pytest.raises(RuntimeError, match="still acts when it is off"):
        selfcheck.run(policy)


class Failing(nn.Module):
    """A model that works on the short probe that finds its head, and raises on anything longer."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        if tokens.shape[1] > 3:
            raise ValueError("only three tokens\nand more lines")
        return self.inner(tokens, cache)

    @property
    def layers(self) -> Any:
        return self.inner.layers


def test_a_model_that_cannot_run_is_one_line():
    policy = make_policy(Failing(make_model("llama")))
    with pytest.raises(UserError, match="^--model tiny: .* cannot be trained here: ValueError: only three tokens$"):
        selfcheck.run(policy)


def test_log_probs_that_are_not_finite_are_one_line():
    policy = make_policy("llama")
    policy.model.update({"model": {"norm": {"weight": mx.full((64,), np.inf)}}})
    with pytest.raises(UserError, match="not finite in float32; check it, or set --dtype"):
        selfcheck.run(policy)


@pytest.mark.parametrize("arch", ["llama", "gemma2", "mistral"])
def test_the_check_leaves_the_model_as_it_was(arch: str):
    policy = make_policy(arch)
    before: Any = tree_flatten(policy.model.parameters())
    trainable: Any = tree_flatten(policy.model.trainable_parameters())
    kinds = [type(m) for _, m in policy.model.named_modules()]
    selfcheck.run(policy)
    after: Any = tree_flatten(policy.model.parameters())
    assert [k for k, _ in before] == [k for k, _ in after]
    assert all(mx.array_equal(x, y) for (_, x), (_, y) in zip(before, after, strict=True))
    assert [k for k, _ in trainable] == [k for k, _ in tree_flatten(policy.model.trainable_parameters())]
    assert [type(m) for _, m in policy.model.named_modules()] == kinds


def in_bfloat16(arch: str) -> Policy:
    model = make_model(arch)
    model.set_dtype(mx.bfloat16)
    policy = make_policy(model, moved=False)
    assert policy.dtype == mx.bfloat16
    return policy


# No CPU has experts in bfloat16.
DENSE = [arch for arch in ALL if arch not in ("qwen3_moe", "olmoe", "granitemoe", "gpt_oss")]


@pytest.mark.parametrize("arch", DENSE)
def test_in_bfloat16_nothing_is_given_up_for_rounding(arch: str):
    policy = in_bfloat16(arch)
    checks = selfcheck.run(policy)
    assert policy.sharing and policy.even == (arch in EVEN)
    assert len(checks.notes) == (arch in EVEN or arch == "llama4_text")
    found = [exactness(line) for line in checks.results.values() if line.startswith("exact to ")]
    assert found and max(found) <= selfcheck.LIMIT[mx.bfloat16] / 3


def longer(x: mx.array) -> mx.array:
    """The same, with a gradient that is 20% too long."""
    return x + 0.2 * (x - mx.stop_gradient(x))


@pytest.mark.parametrize("arch", DENSE)
def test_in_bfloat16_a_gradient_20_percent_off_is_found(arch: str, monkeypatch: pytest.MonkeyPatch):
    right = adapter_layers._fused
    monkeypatch.setattr(adapter_layers, "_fused", lambda linear, x, a, b: right(linear, x, longer(a), b))
    notes = selfcheck.run(in_bfloat16(arch)).notes
    (line,) = [note for note in notes if note.startswith("rows of a batch are not quite what mlx-lm gives for each")]
    assert ".lora_a differs by 2" in line


@pytest.mark.parametrize("arch", ["llama", "qwen3", "lfm2"])
def test_in_bfloat16_a_head_20_percent_off_is_found(arch: str, monkeypatch: pytest.MonkeyPatch):
    right = token_scores._online

    def slope_too_long(*args: Any) -> list[mx.array]:
        *rows, slope = right(*args)
        return [*rows, slope * 1.2]

    monkeypatch.setattr(token_scores, "_online", slope_too_long)
    policy = in_bfloat16(arch)
    assert "differs by 2" in selfcheck.run(policy).results["chunked_head"]
    assert policy.body.whole


@pytest.mark.parametrize("full", [False, True])
def test_full_fine_tuning_and_no_adapter(full: bool):
    policy = make_policy("qwen3", rank=0)
    if full:
        policy.model.unfreeze()
    checks = selfcheck.run(policy)
    assert checks.results["adapter_off"] == "no adapter"
    assert policy.sharing
    assert checks.notes == []


def test_extras_are_what_they_are_for():
    """These change logits after the head, or the tests of it would not test anything."""
    assert not any(make_policy(arch).body.bare for arch in ("gemma2", "cohere2", "granite"))


def test_a_dtype_the_device_cannot_compute_is_one_line():
    model = make_model("qwen3_moe")
    model.set_dtype(mx.bfloat16)
    if mx.default_device().type == mx.DeviceType.cpu:  # no bfloat16 expert layers there
        with pytest.raises(UserError, match="^--model tiny: .*models cannot run here: .*float32"):
            make_policy(model)


def test_a_model_that_looks_at_its_numbers_is_not_compiled_and_says_so():
    policy = make_policy(make_model("llama"))
    layer = forward.layers_of(policy.model)[0]
    kind = type(layer)

    def call(self: object, x: mx.array, *rest: object, **more: object) -> mx.array:
        y = kind.__call__(self, x, *rest, **more)  # type: ignore[arg-type]
        return y if y.sum().item() else -y

    layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    policy.compile()
    checks = selfcheck.run(policy)
    assert not policy.compiled and any("steps are not compiled" in note for note in checks.notes)
    untouched = make_policy(make_model("llama"))
    untouched.compile()
    assert not any("compiled" in note for note in selfcheck.run(untouched).notes) and untouched.compiled
