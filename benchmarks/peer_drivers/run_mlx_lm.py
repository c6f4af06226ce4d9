# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Times mlx-lm 0.32.2's own `mlx_lm.lora --mask-prompt`.

    pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2

SFT only. It adapts every linear layer. Its command line drops a caller's callback, so ours comes in as its reporter.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import common
import mlx.core as mx
import mlx_lm.lora as peer
from mlx_lm.tuner.callbacks import TrainingCallback


class Steps(TrainingCallback):
    """Keeps what the trainer reports after every step; it does not count evaluation."""

    steps_s: list[float] = []
    losses: list[float] = []

    def on_train_loss_report(self, train_info: dict) -> None:
        self.steps_s.append(round(1 / train_info["iterations_per_second"], 4))
        self.losses.append(round(float(train_info["train_loss"]), 6))


def main() -> None:
    a = common.arguments()
    if a.method != "sft":
        raise SystemExit("mlx-lm trains sft only")
    work = Path(tempfile.mkdtemp())
    (work / "data").mkdir()
    for name in ("train", "valid"):  # it wants a valid.jsonl; what it evaluates is not timed
        shutil.copy(a.data, work / f"data/{name}.jsonl")
    recipe = {"lora_parameters": {"rank": a.rank, "scale": a.alpha / a.rank, "dropout": 0.0}}
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    flags = {
        "--model": a.model,
        "--optimizer": "adamw",
        "--data": work / "data",
        "--num-layers": -1,
        "--batch-size": a.batch,
        "--iters": a.steps,
        "--val-batches": 1,
        "--learning-rate": a.learning_rate,
        "--steps-per-report": 1,
        "--save-every": 10**6,
        "--adapter-path": work / "adapter",
        "--max-seq-length": a.max_length,
        "-c": work / "recipe.yaml",
    }
    extra = [word for name, value in common.settings(a.set).items() for word in (f"--{name}", str(value))]
    switches = ["--train", "--mask-prompt", *(["--grad-checkpoint"] * a.checkpoint)]
    sys.argv = ["lora", *switches, *(str(word) for pair in flags.items() for word in pair), *extra]
    steps = Steps()
    setattr(peer, "get_reporting_callbacks", lambda *_, **__: steps)  # noqa: B010 - imported there, not exported
    peer.main()
    common.report(steps_s=steps.steps_s, losses=steps.losses, mlx_peak_gb=mx.get_peak_memory() / 1e9)


main()
