# SPDX-License-Identifier: Apache-2.0
"""Policies over tiny random models, batches of random tokens, and log-probs the naive way to compare with."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from conftest import ARCHITECTURES, VOCAB_SIZE, build_model, model_config
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from mlx_realign import adapter, data, forward
from mlx_realign.batch import Batch, Completion, Example, LossOutput, Scores
from mlx_realign.loading import Loaded
from mlx_realign.policy import Policy
from mlx_realign.workers import Workers

WINDOW = {"sliding_window": 8}
SCALED = {"attention_multiplier": 0.25, "embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}
# Beyond the tests' common architectures: what changes logits after the head, attention masks or positions.
EXTRAS: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},  # soft caps on logits and attention; 5-D attention scores
    "cohere2": {"layer_norm_eps": 1e-5, "logit_scale": 0.25, "sliding_window_pattern": 2, **WINDOW},
    "granite": {"attention_bias": False, "mlp_bias": False, **SCALED},
    "granitemoe": {"attention_bias": False, "num_local_experts": 4, "num_experts_per_tok": 2, **SCALED},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        **WINDOW,
    },  # attention sinks and windows
    "llama4_text": {
        "attention_bias": False,
        "attention_chunk_size": 8,
        "attn_scale": 0.1,
        "attn_temperature_tuning": False,
        "floor_scale": 8192,
        "intermediate_size_mlp": 128,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [1, 1],
        "use_qk_norm": True,
    },  # multiplies by its embedding's weight: no module is the head
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "use_double_wide_mlp": False,
        **WINDOW,
    },  # the upper layers have no keys, values and cache of their own, as in Gemma 4 E2B and E4B
}
ALL = [*ARCHITECTURES, *EXTRAS]
HYBRIDS = ("mamba2", "lfm2")
SHARING = [arch for arch in ALL if arch not in (*HYBRIDS, "gemma2")]


def make_model(arch: str, **changes: Any) -> nn.Module:
    """A tiny random model; `changes` go into its config."""
    if arch in ARCHITECTURES and not changes:
        return build_model(arch)
    extra = EXTRAS.get(arch, {}) | changes
    config = {**model_config(arch if arch in ARCHITECTURES else "llama"), "model_type": arch, **extra}
    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(config))
    model.eval()
    mx.eval(model.parameters())
    return model


def make_policy(model: nn.Module | str, *, moved: bool = True, workers: int = 1, **lora: Any) -> Policy:
    """A policy with LoRA on all linear layers, already away from its start; `rank=0` leaves the adapter off."""
    model = make_model(model) if isinstance(model, str) else model
    config = {"model_type": getattr(model, "model_type", "custom")}
    policy = Policy(Loaded(model, None, config, Path(), []), "tiny")  # pyright: ignore[reportArgumentType]
    if lora.get("rank") != 0:
        adapter.attach(model, **{"rank": 4, "alpha": 8.0, **lora})
        if moved:
            nudge = lambda i, v: v + 0.05 * mx.random.normal(v.shape, key=mx.random.key(i))  # noqa: E731
            noise = [(k, nudge(i, v)) for i, (k, v) in enumerate(adapter.state(model).items())]
            model.load_weights(noise, strict=False)
    policy.workers = Workers(workers)
    policy.refresh()
    policy.mark_start()
    mx.eval(model.state)
    return policy


class Numbers:
    """A tokenizer whose text is the ids; tests that use it say what ends a completion themselves."""

    eos_token_ids = {0, 11}
    decode = staticmethod(lambda ids: " ".join(map(str, ids)))


def speaking(monkeypatch: Any, arch: str, **options: Any) -> Policy:
    """A policy that can generate."""
    policy = make_policy(arch, **options)
    policy.sharing = arch in SHARING
    policy.tokenizer = Numbers()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(data, "stop_ids", lambda _: {0})
    return policy


def make_examples(shapes: list[tuple[int, list[int]]], seed: int = 0) -> list[Example]:
    """One example per (prompt length, completion lengths); long ones have an untrained token, their third."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(3, VOCAB_SIZE - 1, n).astype(np.int32)  # noqa: E731
    examples = []
    for prompt, lengths in shapes:
        completions = tuple(Completion(draw(n), np.array([i != 2 or n < 4 for i in range(n)])) for n in lengths)
        examples.append(Example(draw(prompt), completions, 0, "", {}))
    return examples


# Prompts longer and shorter than the models' windows of 8, one of a single token; completions longer than it too.
SHAPES = [(14, [5, 9]), (3, [12, 1, 6]), (1, [4]), (19, [7])]


def make_batch(shapes: list[tuple[int, list[int]]] | None = None, **options: Any) -> Batch:
    return data.collate(make_examples(shapes or SHAPES), **options)


def naive_logps(model: nn.Module, examples: list[Example]) -> list[np.ndarray]:
    """Each completion alone, unpadded: log-softmax in float64 of the logits at the token before, 0 where untrained."""
    found = []
    for example in examples:
        for tokens, mask in example.completions:
            row = np.concatenate([example.prompt, tokens])
            logits = np.array(model(mx.array(row)[None])[0].astype(mx.float32)).astype(np.float64)
            logits = logits[len(example.prompt) - 1 : -1]
            top = logits.max(-1, keepdims=True)
            every = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
            found.append(np.where(mask, every[np.arange(len(tokens)), tokens], 0.0))
    return found


def weighed(seed: int = 5) -> Any:
    """A loss that weighs every token differently, by its own place in its row, so that no error cancels."""

    def loss(scores: Scores, batch: Batch) -> LossOutput:
        weights = mx.cos(seed + batch.completion.astype(mx.float32))
        count = batch.mask.sum().astype(mx.float32)
        metrics = {"squares": ((scores.logps * scores.logps).sum(), count)}
        return LossOutput((weights * scores.logps).sum(), count, metrics)

    return loss


def flat(grads: Any) -> dict[str, np.ndarray]:
    found: Any = tree_flatten(grads)
    return {k: np.array(v.astype(mx.float32)) if isinstance(v, mx.array) else v for k, v in found}


def gap(found: Any, expected: Any) -> float:
    """Largest difference of two gradients, each tensor relative to its own largest entry (never under 1% of all)."""
    one, other = flat(found), flat(expected)
    assert one.keys() == other.keys()
    steepest = max(np.abs(x).max() for x in other.values())
    sizes = {k: max(np.abs(v).max(), 1e-2 * steepest) for k, v in other.items()}
    return float(max(np.abs(one[k] - other[k]).max() / sizes[k] for k in other))


def assert_same(policy: Policy, batch: Batch, other: Policy, other_batch: Batch, limit: float) -> None:
    """Total, count and gradient of two ways agree to `limit`, relative."""
    one, one_slope = policy.gradients(batch, weighed())
    two, two_slope = other.gradients(other_batch, weighed())
    assert abs(float(one.total.item()) - float(two.total.item())) <= limit * abs(float(two.total.item()))  # pyright: ignore
    assert one.count.item() == two.count.item()
    assert gap(one_slope, two_slope) <= limit


def with_sharing(policy: Policy, on: bool) -> Policy:
    policy.sharing = on
    return policy


def checkpointed(policy: Policy) -> Policy:
    forward.checkpoint_layers(policy.model)
    return policy
