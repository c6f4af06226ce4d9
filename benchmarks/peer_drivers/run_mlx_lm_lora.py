# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Times mlx-lm-lora 5.10.2's own command line (`pip install "mlx[cpu]==0.32.4" mlx-lm-lora==5.10.2 cmeel-openblas`).

It adapts every linear layer. Its DPO always computes the reference in the step, with a second copy of the model. Fusing
after the run is switched off. `mx.device_info` is given the one key it reads that a CPU does not have.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import common
import mlx.core as mx
import mlx_lm_lora.train as peer
from mlx_lm.tuner.callbacks import TrainingCallback

device_info = mx.device_info
mx.device_info = lambda *device: {"max_recommended_working_set_size": 16 << 30, **device_info(*device)}
set_wired_limit = mx.set_wired_limit
mx.set_wired_limit = lambda limit: set_wired_limit(limit) if mx.metal.is_available() else 0


class Steps(TrainingCallback):
    """Keeps what the trainer reports after every step; it does not count evaluation."""

    steps_s: list[float] = []
    losses: list[float] = []

    def on_train_loss_report(self, train_info: dict) -> None:
        self.steps_s.append(round(1 / train_info["iterations_per_second"], 4))
        self.losses.append(round(float(train_info["train_loss"]), 6))


def main() -> None:
    a = common.arguments()
    if a.precompute:
        raise SystemExit("mlx-lm-lora cannot compute the reference beforehand")
    work = Path(tempfile.mkdtemp())
    (work / "data").mkdir()
    shutil.copy(a.data, work / "data/train.jsonl")
    recipe = {"fuse": False, "lora_parameters": {"rank": a.rank, "scale": a.alpha / a.rank, "dropout": 0.0}}
    (work / "recipe.yaml").write_text(json.dumps(recipe))
    flags = {
        "--model": a.model,
        "--train-mode": a.method,
        "--train-type": "lora",
        "--optimizer": "adamw",
        "--data": work / "data",
        "--num-layers": -1,
        "--batch-size": a.batch,
        "--iters": a.steps,
        "--learning-rate": a.learning_rate,
        "--steps-per-report": 1,
        "--save-every": 10**6,
        "--adapter-path": work / "adapter",
        "--max-seq-length": a.max_length,
        "-c": work / "recipe.yaml",
    }
    switches = ["--train", *(["--mask-prompt"] if a.method == "sft" else []), *(["--grad-checkpoint"] * a.checkpoint)]
    extra = [word for name, value in common.settings(a.set).items() for word in (f"--{name}", str(value))]
    sys.argv = ["train", *switches, *(str(word) for pair in flags.items() for word in pair), *extra]
    steps, run = Steps(), peer.run
    peer.run = lambda args, training_callback=None: run(args, steps)
    peer.main()
    common.report(steps_s=steps.steps_s, losses=steps.losses, mlx_peak_gb=mx.get_peak_memory() / 1e9)


main()
