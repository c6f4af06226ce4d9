# SPDX-License-Identifier: Apache-2.0
"""Whole runs laid out and compiled as on a GPU, under a pretended one, against the same runs on a CPU, step by step."""

import json
import random
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_realign import sums
from mlx_realign.policy import Policy
from mlx_realign.workers import Workers

HERE = Path(__file__).parent
WORDS = "the cat sat on a mat and then it ran off to see what was there by the old red house in a wood".split()
QUICK = {
    "dpo": {},
    "grpo": {"verifier": "length:3-6", "max_new_tokens": 12, "group_size": 4},
}
SLOW = {
    "sft": {},
    "dpo": {"ld_alpha": 0.5},
    "dpo aot": {"loss_type": "aot", "gradient_accumulation": 1},
    "orpo": {"nll_on_prompt": True},
    "cpo": {},
    "kto": {},
    "grpo bnpo": {"verifier": "length:3-6", "max_new_tokens": 12, "loss_type": "bnpo", "gradient_accumulation": 1},
}
EQUAL = 1e-5  # relative


def rows(method: str) -> list[dict[str, Any]]:
    """48 rows of very unequal lengths."""
    draw = random.Random(1)

    def text(median: float) -> str:
        return " ".join(draw.choices(WORDS, k=max(1, int(draw.lognormvariate(0, 0.8) * median))))

    pairs = [{"prompt": text(12), "chosen": text(8), "rejected": text(8)} for _ in range(48)]
    if method in ("dpo", "orpo", "cpo"):
        return pairs
    if method == "grpo":
        return [{"prompt": row["prompt"]} for row in pairs]
    told = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    return [row | {"label": i % 2 == 0} for i, row in enumerate(told)] if method == "kto" else told


def run(case: str, options: dict[str, Any], output: Path) -> list[dict[str, Any]]:
    """Metrics of every step of a run."""
    from mlx_realign import train

    method = case.split()[0]
    common = {"steps": 4, "gradient_accumulation": 2, "learning_rate": 1e-3, "kl_every": 0, "dtype": "float32"}
    train(model="tiny-chat", method=method, data=rows(method), output=str(output), **common | options)
    return metrics_of(output)


def metrics_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def compared(cases: dict[str, dict[str, Any]], folder: Path) -> None:
    program = (
        "import sys, json; sys.path.insert(0, 'tests'); import pretended_gpu; pretended_gpu.begin()\n"
        "from pathlib import Path; import test_exact_runs as t\n"
        "cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])\n"
        "for case, options in cases.items(): t.run(case, options, folder / 'gpu' / case.replace(' ', '_'))"
    )
    command = [sys.executable, "-c", program, json.dumps(cases), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, options in cases.items():
        expected = run(case, options, folder / "cpu" / case)
        found = metrics_of(folder / "gpu" / case.replace(" ", "_"))
        assert len(found) == len(expected) == 4
        assert found[-1]["shapes"] <= 32 and found[-1]["mask_free_share"] == 1
        for one, other in zip(found, expected, strict=True):
            for name in ("loss", "grad_norm", "num_tokens"):
                assert one[name] == pytest.approx(other[name], rel=EQUAL), (case, one["step"], name)


def test_pairs_and_groups_have_the_same_losses_and_gradients(tmp_path: Path):
    compared(QUICK, tmp_path)


@pytest.mark.slow
def test_all_other_methods_have_the_same_losses_and_gradients(tmp_path: Path):
    compared(SLOW, tmp_path)


def test_a_step_waits_once_for_each_of_its_parts_and_reads_one_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The next micro-batch is made while the device computes the last one, so nothing else may ask for numbers."""
    train: Any = import_module("mlx_realign.train")
    counts: Counter[str] = Counter()
    steps: list[Counter[str]] = []

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in ((mx, "eval"), (mx, "async_eval"), (sums, "averages"), (sums, "number_of")):
        counted(module, name)
    for name in ("averages", "number_of"):
        monkeypatch.setattr(train, name, getattr(sums, name))
    step = train.Loop.step

    def one(self: Any) -> dict[str, Any]:
        self.policy.workers = Workers(1)
        counts.clear()
        row = step(self)
        steps.append(Counter(counts))
        return row

    monkeypatch.setattr(train.Loop, "step", one)
    prepare = Policy.prepare_for

    def prepared(self: Policy, *arguments: Any) -> None:
        self.exact = True
        prepare(self, *arguments)

    monkeypatch.setattr(Policy, "prepare_for", prepared)
    run("orpo", {"steps": 5, "batch_size": 2}, tmp_path / "counted")
    for found in steps[1:]:  # the first also proves that weights move
        assert found["averages"] == 1 and found["number_of"] == 0
        assert found["async_eval"] == 5 and found["eval"] == 3  # 2 micro-batches of 2 rows: 4 parts and the update
