# SPDX-License-Identifier: Apache-2.0
"""Operations a layer of one training step, as a GPU would get them, before MLX fuses any: ours and mlx-lm's trainer.

    python tests/operations.py [llama]

prints a line of JSON: {"mlx-lm": {operation: count}, "plain": ..., "shared": ...}. LoRA on every linear layer; a row by
itself, and two completions behind a prompt that is computed once. Models of 4 layers less those of 2, halved.
"""

import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pretended_gpu
from mlx.utils import tree_flatten

RNG = np.random.default_rng(0)


def operations(loss: mx.array, grads: Any) -> Counter[str]:
    """Of the graph that computes these."""
    slopes: Any = tree_flatten(grads)
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, loss, *(value for _, value in slopes))
        text = Path(file.name).read_text(encoding="utf-8")
    return Counter(re.findall(r'label ="([A-Za-z]+)[^"]*", shape=rectangle', text))


def ours(arch: str, layers: int, lengths: tuple[int, ...], prefix: int) -> Counter[str]:
    """A step of this project."""
    from policy_tools import make_model, make_policy

    from mlx_realign import data
    from mlx_realign.batch import Completion, Example, LossOutput

    draw = lambda n: RNG.integers(3, 60, n).astype(np.int32)  # noqa: E731
    completions = tuple(Completion(draw(n), np.ones(n, bool)) for n in lengths)
    batch = data.collate_exact([Example(draw(17), completions, 0, "", {})], prefix)
    policy = make_policy(make_model(arch, num_hidden_layers=layers))
    out, grads = policy.differentiate(batch, lambda scores, _: LossOutput(scores.logps.sum(), mx.array(1.0), {}))
    return operations(out.total, grads)


def theirs(arch: str, layers: int) -> Counter[str]:
    """A step of mlx-lm's trainer."""
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from policy_tools import make_model

    model = make_model(arch, num_hidden_layers=layers)
    model.freeze()
    names = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    keys = sorted({re.sub(r"^model\.layers\.\d+\.", "", name) for name in names if ".layers." in name})
    linear_to_lora_layers(model, layers, {"rank": 8, "scale": 2.0, "dropout": 0.0, "keys": keys})
    model.train()
    tokens = mx.array(RNG.integers(3, 60, (1, 30)).astype(np.int32))
    (loss, _), grads = nn.value_and_grad(model, default_loss)(model, tokens, mx.array([[17, 29]]))
    return operations(loss, grads)


def a_layer(count: Callable[[int], Counter[str]]) -> dict[str, float]:
    few, many = count(2), count(4)
    return {name: (many[name] - few[name]) / 2 for name in sorted(many) if many[name] != few[name]}


def main(arch: str = "llama") -> int:
    """Print the counts."""
    pretended_gpu.begin()
    found = {
        "mlx-lm": a_layer(lambda n: theirs(arch, n)),
        "plain": a_layer(lambda n: ours(arch, n, (12,), 0)),
        "shared": a_layer(lambda n: ours(arch, n, (12, 14), 16)),
    }
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
