# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Times TRL 1.16 + PEFT on torch's CPU backend (`pip install torch==2.13.0 trl==1.16.0 peft==0.21.2`), float32."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import common
from datasets import Dataset, disable_caching
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TRAINERS = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, DPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "cpo": (CPOTrainer, CPOConfig),
}


def main() -> None:
    a = common.arguments()
    disable_caching()
    clock = common.Clock()

    class Marks(TrainerCallback):
        def on_step_begin(self, *_, **__) -> None:
            clock.begin()

        def on_step_end(self, *_, **__) -> None:
            clock.end()

    trainer_class, config_class = TRAINERS[a.method]
    fields = {"precompute_ref_log_probs": True} if a.precompute else {}
    config = config_class(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=a.batch,
        max_steps=a.steps,
        learning_rate=a.learning_rate,
        lr_scheduler_type="constant",
        max_length=a.max_length,
        gradient_checkpointing=a.checkpoint,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **fields,
        **common.settings(a.set),
    )
    trainer = trainer_class(
        model=a.model,
        args=config,
        train_dataset=Dataset.from_list([common.conversational(row) for row in common.rows(a.data)]),
        peft_config=LoraConfig(r=a.rank, lora_alpha=a.alpha, lora_dropout=0.0, target_modules="all-linear"),
        callbacks=[Marks()],
    )
    trainer.train()
    losses = [round(entry["loss"], 6) for entry in trainer.state.log_history if "loss" in entry]
    before = clock.marks[0] - clock.created
    common.report(steps_s=common.seconds(clock), losses=losses, mlx_peak_gb=None, before_first_step_s=round(before, 2))


main()
