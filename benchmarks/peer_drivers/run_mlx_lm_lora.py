# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Times mlx-lm-lora 5.10.2's own command line (`pip install "mlx[cpu]==0.32.4" mlx-lm-lora==5.10.2`).

It adapts every linear layer. Its DPO always computes the reference in the step, with a second copy of the model. Fusing
after the run is switched off. `mx.device_info` is given the one key it reads that a CPU does not have.

GRPO: it decodes, scores and differentiates as many completions at a time as there are prompts, and loads a second copy
of the model also where no KL is asked for. Its command line cannot switch nucleus and top-k sampling off; this does.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import mlx_lm_lora.train as peer
import reward
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm_lora.trainer import grpo_trainer
from mlx_lm_lora.trainer.grpo_reward_functions import register_reward_function

# It puts a system turn of its own before every prompt of GRPO: this is what SmolLM2's template puts there by itself.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

device_info = mx.device_info
mx.device_info = lambda *device: {"max_recommended_working_set_size": 16 << 30, **device_info(*device)}
set_wired_limit = mx.set_wired_limit
mx.set_wired_limit = lambda limit: set_wired_limit(limit) if mx.metal.is_available() else 0


class Steps(TrainingCallback):
    """Keeps what the trainer reports after every step; it does not count evaluation."""

    steps_s: list[float] = []
    losses: list[float] = []
    lengths: list[float] = []

    def on_train_loss_report(self, train_info: dict) -> None:
        self.steps_s.append(round(1 / train_info["iterations_per_second"], 4))
        self.losses.append(round(float(train_info["train_loss"]), 6))
        self.lengths.append(train_info.get("train_average_generated_tokens", 0.0))


@register_reward_function()
def letter_share(completions: list[str], **_: Any) -> list[float]:
    """The reward as this peer calls one."""
    return [reward.verify(text) for text in completions]


def prepare_grpo(a, rollouts_s: list[float]) -> dict[str, Any]:  # noqa: ANN001
    """Its flags for GRPO; plain sampling at temperature 1, rollouts timed."""
    grpo_trainer.generate_grpo = common.timed(grpo_trainer.generate_grpo, rollouts_s)
    peer.GRPOTrainingArgs = functools.partial(peer.GRPOTrainingArgs, top_p=1.0, top_k=0)  # type: ignore[misc]
    return {
        "--group-size": a.group_size,
        "--max-completion-length": a.max_new_tokens,
        "--temperature": 1.0,
        "--beta": 0.0,
        "--grpo-loss-type": "grpo",
        "--reward-functions": "letter_share",
    }


def main() -> None:
    a = common.arguments()
    if a.precompute:
        raise SystemExit("mlx-lm-lora cannot compute the reference beforehand")
    work = Path(tempfile.mkdtemp())
    (work / "data").mkdir()
    rows = common.rows(a.data)
    if a.method == "grpo":
        rows = [{"prompt": row["prompt"], "answer": "", "system": SYSTEM} for row in rows]
    (work / "data/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    steps, rollouts_s = Steps(), []
    flags |= prepare_grpo(a, rollouts_s) if a.method == "grpo" else {}
    switches = ["--train", *(["--mask-prompt"] if a.method == "sft" else []), *(["--grad-checkpoint"] * a.checkpoint)]
    extra = [word for name, value in common.settings(a.set).items() for word in (f"--{name}", str(value))]
    sys.argv = ["train", *switches, *(str(word) for pair in flags.items() for word in pair), *extra]

    def finish() -> None:
        tokens = [round(length * a.batch * a.group_size) for length in steps.lengths]
        notes = {"rollouts_s": rollouts_s, "tokens": tokens} if a.method == "grpo" else {}
        common.report(steps_s=steps.steps_s, losses=steps.losses, mlx_peak_gb=mx.get_peak_memory() / 1e9, **notes)

    common.limit(a.limit, finish)
    run = peer.run
    peer.run = lambda args, training_callback=None: run(args, steps)
    peer.main()
    finish()


main()
