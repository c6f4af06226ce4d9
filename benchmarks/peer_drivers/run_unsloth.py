# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Times unsloth_zoo's MLX trainers (unsloth_zoo 2026.10.9, used as an installed package, unchanged).

    pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2 "transformers<=5.17.0" "datasets>=4.1.1,<4.4" \
        psutil msgspec pillow && pip install --no-deps unsloth_zoo==2026.10.9

Its defaults except for what `common.py` names; gradient checkpointing, on by default in two places, only with
--checkpoint. Messages, because it tokenises plain strings without the chat template. On a CPU it has to be told that
this is Apple silicon while it is imported, and the sizes of a device that `mx.device_info` does not report there.
GRPO makes its completions before it says that a step begins, so its first step starts where training starts.
"""

import os
import platform
import tempfile
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import common

arguments = common.arguments()
real = platform.system, platform.machine
platform.system, platform.machine = lambda: "Darwin", lambda: "arm64"
import unsloth_zoo  # noqa: E402

assert unsloth_zoo.DEVICE_TYPE == "mlx"
platform.system, platform.machine = real

import mlx.core as mx  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from unsloth_zoo.mlx import generate as generation  # noqa: E402
from unsloth_zoo.mlx import trainer as trainers  # noqa: E402
from unsloth_zoo.mlx.loader import FastMLXModel  # noqa: E402

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 1 << 30

device_info = mx.device_info
assumed = {"max_recommended_working_set_size": 16 * GIB, "memory_size": 24 * GIB, "device_name": "cpu"}
mx.device_info = lambda *device: {**assumed, **device_info(*device)}


def fields_of(a) -> dict[str, Any]:  # noqa: ANN001
    """Settings of its trainer, under its names."""
    fields: dict[str, Any] = {
        "per_device_train_batch_size": a.batch,
        "gradient_accumulation_steps": 1,
        "max_steps": a.steps,
        "learning_rate": a.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_seq_length": a.max_length,
        "output_dir": tempfile.mkdtemp(),
    }
    if not a.checkpoint:
        fields["gradient_checkpointing"] = False
    if a.method in ("dpo", "orpo", "cpo"):
        fields["max_length"] = a.max_length
    if a.method in ("orpo", "cpo"):
        fields["max_prompt_length"] = a.max_length * 3 // 4  # its default, 512, has to be below max_length
    if a.method == "grpo":
        fields |= common.grpo_fields(a)
    if a.precompute:
        fields["precompute_ref_log_probs"] = True
    return fields | common.settings(a.set)


def main(a) -> None:  # noqa: ANN001
    checkpoint = {} if a.checkpoint else {"use_gradient_checkpointing": False}
    model, tokenizer = FastMLXModel.from_pretrained(
        a.model, max_seq_length=a.max_length, dtype=None if a.dtype == "auto" else a.dtype, load_in_4bit=False
    )
    model = FastMLXModel.get_peft_model(
        model, r=a.rank, lora_alpha=a.alpha, max_seq_length=a.max_length, target_modules=LINEAR, **checkpoint
    )
    clock, losses = common.Clock(mx.synchronize), []
    rollouts_s: list[float] = []
    tokens: list[int] = []

    class Marks(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            clock.begin()

        def on_step_end(self, *_, **__) -> None:
            clock.end()

    prefix = "" if a.method == "sft" else a.method.upper()
    config = getattr(trainers, f"MLX{prefix}Config" if prefix else "MLXTrainingConfig")(**fields_of(a))
    rows = Dataset.from_list([common.conversational(row) for row in common.rows(a.data)])
    rewards = {"reward_funcs": [common.counting_reward(tokens)]} if a.method == "grpo" else {}
    trainer = getattr(trainers, f"MLX{prefix}Trainer")(
        model, tokenizer, rows, args=config, callbacks=[Marks()], **rewards
    )
    trainer.add_step_callback(lambda step, total, loss, *_: losses.append(round(float(loss), 6)))
    start = time.perf_counter()

    def finish() -> None:
        done = common.seconds(clock)
        notes = {"before_first_step_s": round(clock.marks[0] - start, 2)} if clock.marks else {}
        notes |= {"rollouts_s": rollouts_s, "tokens": tokens} if a.method == "grpo" else {}
        common.report(steps_s=done, losses=losses, mlx_peak_gb=mx.get_peak_memory() / 1e9, **notes)

    common.limit(a.limit, finish)
    if a.method == "grpo":
        generation.generate_batch = common.timed(generation.generate_batch, rollouts_s)
        clock.begin()
    trainer.train()
    finish()


main(arguments)
