# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Make `trl_*.json` and `trl_*.safetensors`: what TRL itself computes on the tiny model, step by step.

    python -m venv V && V/bin/pip install torch==2.13.0 trl==1.16.0 peft==0.21.2
    V/bin/python tests/golden/make_trl.py

Every run starts from the same PEFT adapter (`tiny.py`) and takes the rows of `rows.py` in file order, two rows a
micro-batch, eight optimizer steps, float32, torch AdamW (betas 0.9 and 0.999, eps 1e-8, no decay), constant rate,
gradients clipped to norm 1. The DPO reference is the policy as it starts: TRL copies a loaded adapter into one named
"ref"; only `sigmoid_ref_base` has the bare model as its reference. A JSON file holds
  rows     the token ids TRL trained on; labels are -100 where it did not; KTO's have their `label`, good or not, too
  runs     name -> settings, and steps: what TRL logged (its names, unrounded; grad_norm is before clipping).
           With accumulation the loss is TRL's; its metrics are means of micro-batch means
  noise    largest difference of a loss between two attention implementations of torch: tolerances start above it
and the safetensors file, for the runs of GRADIENT and FINAL, `<run>/grad/<PEFT name>` (first step, before clipping)
and `<run>/final/<PEFT name>` (the adapter after the last step).
"""

import argparse
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_caching, disable_progress_bars
from peft import PeftModel
from rows import COMPLETIONS, PAIRS, UNPAIRED
from safetensors.numpy import save_file
from tiny import CONFIG, TOKENIZER, adapter_weights, base_weights, fingerprint, write_adapter, write_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

HERE = Path(__file__).parent
STEPS, BATCH = 8, 2
# Nothing follows the last end-of-turn token, so "completion" is the same tokens whether or not a trailer is trained.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

DPO_RUNS: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "sigmoid_accumulate2": {"gradient_accumulation_steps": 2},
    "sigmoid_ref_base": {},
    "sigmoid_dora": {},
    "hinge": {"loss_type": ["hinge"]},
    "ipo": {"loss_type": ["ipo"]},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 1e-3},
    "nca_pair": {"loss_type": ["nca_pair"]},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "bco_pair": {"loss_type": ["bco_pair"]},
    "sppo_hard": {"loss_type": ["sppo_hard"]},
    "aot": {"loss_type": ["aot"]},
    "aot_unpaired": {"loss_type": ["aot_unpaired"]},
    "apo_zero": {"loss_type": ["apo_zero"]},
    "apo_down": {"loss_type": ["apo_down"]},
    "discopop": {"loss_type": ["discopop"]},
    "sigmoid_norm": {"loss_type": ["sigmoid_norm"]},
    "sigmoid_sft": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "ld_alpha": {"ld_alpha": 0.5},
    "wpo": {"use_weighting": True},
}
SFT_RUNS: dict[str, dict[str, Any]] = {
    "nll": {},
    "nll_accumulate2": {"gradient_accumulation_steps": 2},
    "nll_dora": {},
    "dft": {"loss_type": "dft"},
}
ORPO_RUNS: dict[str, dict[str, Any]] = {"orpo": {}, "orpo_accumulate2": {"gradient_accumulation_steps": 2}}
CPO_RUNS: dict[str, dict[str, Any]] = {
    "cpo": {},
    "cpo_accumulate2": {"gradient_accumulation_steps": 2},
    "cpo_smoothed": {"label_smoothing": 0.1},
    "cpo_hinge": {"loss_type": "hinge"},
    "cpo_ipo": {"loss_type": "ipo"},
    "simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    "cpo_simpo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.5},
    "alphapo": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0, "alpha": 0.25},
}
KTO_RUNS: dict[str, dict[str, Any]] = {
    "kto": {},
    "kto_weighted": {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}
FILES = {  # the rate moves the loss a lot in eight steps without driving a hinge to zero
    "trl_dpo": (DPOTrainer, DPOConfig, PAIRS, 2e-3, DPO_RUNS),
    "trl_sft": (SFTTrainer, SFTConfig, COMPLETIONS, 1e-2, SFT_RUNS),
    "trl_orpo": (ORPOTrainer, ORPOConfig, PAIRS, 1e-2, ORPO_RUNS),
    "trl_cpo": (CPOTrainer, CPOConfig, PAIRS, 2e-3, CPO_RUNS),
    "trl_kto": (KTOTrainer, KTOConfig, UNPAIRED, 5e-3, KTO_RUNS),
}
# At the reference itself the first gradients of most losses differ by little more than a factor: no need to hold all.
GRADIENT = (
    *list(DPO_RUNS)[:6],
    "nca_pair",
    "robust",
    "apo_zero",
    "sigmoid_sft",
    "ld_alpha",
    "wpo",
    *SFT_RUNS,
    *ORPO_RUNS,
    *CPO_RUNS,
    *KTO_RUNS,
)
FINAL = ("sigmoid", "sigmoid_accumulate2", "nll", "nll_accumulate2", "nll_dora", "orpo", "cpo")
UNSTABLE_KEYS = ("epoch", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(FILES), choices=list(FILES))
    chosen = parser.parse_args().only
    torch.set_num_threads(1)  # one order of summation
    torch.use_deterministic_algorithms(True)
    disable_caching()
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    write_tokenizer()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_model(work / "model")
        for dora in (False, True):
            write_adapter(work / adapter_name(dora), dora)
        for name in chosen:
            make_file(name, work)


def write_tokenizer() -> None:
    """Byte-level BPE trained on the rows themselves, 300 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    turns = [turn for row in PAIRS for key in ("prompt", "chosen", "rejected") for turn in row[key]]
    tokenizer.train_from_iterator([f"{turn['role']}\n{turn['content']}" for turn in turns], trainer)
    TOKENIZER.mkdir(exist_ok=True)
    tokenizer.save(str(TOKENIZER / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|pad|>",
        "model_max_length": CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    (TOKENIZER / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (TOKENIZER / "chat_template.jinja").write_text(TEMPLATE)


def make_file(name: str, work: Path) -> None:
    """Run every run of one file and write its JSON and safetensors."""
    *_, learning_rate, runs = FILES[name]
    tensors: dict[str, Any] = {}
    content: dict[str, Any] = {
        "made_with": {package: version(package) for package in ("trl", "peft", "torch", "transformers")},
        "weights": {
            "base": fingerprint(base_weights()),
            "adapter": fingerprint(adapter_weights()),
            "dora_adapter": fingerprint(adapter_weights(dora=True)),
        },
        "common": {
            "batch_size": BATCH,
            "steps": STEPS,
            "learning_rate": learning_rate,
            "max_grad_norm": 1.0,
            "optimizer": "adamw",
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 0.0,
        },
        "rows": [],
        "runs": {},
        "noise": {},
    }
    for run, settings in runs.items():
        result, other = (train(name, run, work, attention) for attention in ("eager", "sdpa"))
        content["rows"] = content["rows"] or result["rows"]
        assert content["rows"] == result["rows"]
        content["runs"][run] = {"settings": settings, "steps": result["steps"]}
        pairs = zip(result["steps"], other["steps"], strict=True)
        content["noise"][run] = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
        if run in GRADIENT:
            tensors |= {f"{run}/grad/{key}": value for key, value in result["grad"].items()}
        if run in FINAL:
            tensors |= {f"{run}/final/{key}": value for key, value in result["final"].items()}
        first, last = (result["steps"][i]["loss"] for i in (0, -1))
        print(f"{name} {run}: loss {first:.6f} -> {last:.6f}, noise {content['noise'][run]:.1e}")
    save_file(tensors, HERE / f"{name}.safetensors")
    (HERE / f"{name}.safetensors").chmod(0o644)
    (HERE / f"{name}.json").write_text(_compact(content))


def train(name: str, run: str, work: Path, attention: str) -> dict[str, Any]:
    """One run of TRL; returns its token rows, its log, the first step's gradients and the final adapter."""
    trainer_class, config_class, rows, learning_rate, runs = FILES[name]

    class Recording(trainer_class):
        """TRL's trainer, which also keeps the gradients of the first optimizer step (before they are clipped)."""

        first_gradient: dict | None = None
        micro_batches = 0

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            self.micro_batches += 1
            if self.micro_batches == self.args.gradient_accumulation_steps:
                self.first_gradient = {_plain(n): p.grad.numpy().copy() for n, p in adapter_parameters(self.model)}
            return loss

    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32, attn_implementation=attention)

    policy = PeftModel.from_pretrained(load(), work / adapter_name("dora" in run), is_trainable=True)
    reference = {"ref_model": load()} if run.endswith("ref_base") else {}
    config = config_class(
        output_dir=str(work / "output"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **runs[run],
    )
    trainer = Recording(
        model=policy,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        **reference,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = [{k: v for k, v in entry.items() if k not in UNSTABLE_KEYS} for entry in trainer.state.log_history[:-1]]
    assert [entry.pop("step") for entry in log] == list(range(1, STEPS + 1))
    final = {_plain(name): p.detach().numpy().copy() for name, p in adapter_parameters(trainer.model)}
    return {"rows": token_rows(trainer.train_dataset), "steps": log, "grad": trainer.first_gradient, "final": final}


def token_rows(dataset: Dataset) -> list[dict[str, list[int]]]:
    """What TRL trains on: whole sequences and their labels, in one format for all trainers."""
    rows = []
    for row in dataset.to_list():
        if "label" in row:  # KTO
            ids, completion = row["prompt_ids"], row["completion_ids"]
            labels = [-100] * len(ids) + completion
            rows.append({"input_ids": ids + completion, "labels": labels, "label": row["label"]})
        elif "labels" in row:  # SFT
            rows.append({"input_ids": row["input_ids"], "labels": row["labels"]})
        elif "chosen_labels" in row:  # ORPO, CPO
            rows.append({f"{s}_{k}": row[f"{s}_{k}"] for s in ("chosen", "rejected") for k in ("input_ids", "labels")})
        else:  # DPO
            sides = {side: row[f"{side}_ids"] for side in ("chosen", "rejected")}
            ids = {f"{side}_input_ids": row["prompt_ids"] + tokens for side, tokens in sides.items()}
            labels = {f"{side}_labels": [-100] * len(row["prompt_ids"]) + tokens for side, tokens in sides.items()}
            rows.append(ids | labels)
    return rows


def adapter_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def adapter_name(dora: bool) -> str:
    return "adapter_dora" if dora else "adapter"


def _plain(name: str) -> str:
    """The name PEFT writes to disk: without the adapter's own name."""
    return name.replace(".default.weight", ".weight" if "magnitude" not in name else "").replace(".default", "")


def _compact(content: dict[str, Any]) -> str:
    """Indented JSON with one line per row and per step."""
    text = {key: value for key, value in content.items() if key not in ("rows", "runs")}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in text.items()]
    lines.append('  "rows": [\n    ' + ",\n    ".join(json.dumps(row) for row in content["rows"]) + "\n  ]")
    runs = []
    for name, run in content["runs"].items():
        steps, settings = ",\n      ".join(json.dumps(step) for step in run["steps"]), json.dumps(run["settings"])
        runs.append(f'    {json.dumps(name)}: {{"settings": {settings}, "steps": [\n      {steps}\n    ]}}')
    lines.append('  "runs": {\n' + ",\n".join(runs) + "\n  }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
