# SPDX-License-Identifier: Apache-2.0
"""Commands, as a user calls them, on a tiny model under a pretended GPU: training, ablation, steering, in one process.

    python tests/pretended_gpu_runs.py qwen3_5 sft dpo-checkpointed

prints a row of JSON for each run: exit code, seconds, losses, how far the adapter has moved, kernels met. Runs have the
names in RUNS; without one, all are made.
"""

import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import pretended_gpu

RUNS = "sft dpo grpo sft-checkpointed dpo-checkpointed grpo-checkpointed ablate extract generate".split()
TRAIN = "--steps 2 --batch-size 2 --lora-rank 2 --learning-rate 1e-2 --kl-every 0 --compile on --save-every 100".split()
GRPO = "--group-size 4 --max-new-tokens 6 --verifier tests/pretended_gpu_runs.py:short --temperature 1.5".split()


def short(completion: str, row: dict[str, Any]) -> float:
    """A reward that differs within a group: the share of even bytes."""
    said = completion.encode()
    return sum(byte % 2 == 0 for byte in said) / max(len(said), 1)


def words(run: str, folder: Path, model: Path) -> list[str]:
    """The command line of a run; `generate` needs what `extract` writes."""
    name, _, checkpointed = run.partition("-")
    common, sides = ["--model", str(model)], [str(folder / f"{side}.txt") for side in ("positive", "negative")]
    contrast = ["--positive", sides[0], "--negative", sides[1]]
    direction = str(folder / "direction.safetensors")
    if name == "ablate":
        quick = "--markers o,e --position last --block 1 --weight 1 --max-new-tokens 4 --max-kl 1000".split()
        return ["ablate", *common, *contrast, *quick, "--output", str(folder / run)]
    if name == "extract":
        quick = ["--block", "1", "--no-calibrate", "--output", direction]
        return ["steer", "extract", *common, *contrast, *quick]
    if name == "generate":
        asked = ["--steer", f"{direction}:1.0", "--prompt", "Say 3", "--max-new-tokens", "6", "--json"]
        return ["steer", "generate", *common, *asked]
    found = ["train", "--method", name, *common, "--data", str(folder / f"{name}.jsonl"), "--output", str(folder / run)]
    return [*found, *TRAIN, *(GRPO if name == "grpo" else []), *(["--grad-checkpoint"] if checkpointed else [])]


def write_data(folder: Path) -> None:
    """Rows of all runs."""
    from train_tools import pair_rows, sft_rows, write_rows

    write_rows(folder / "sft.jsonl", sft_rows(4))
    write_rows(folder / "dpo.jsonl", pair_rows(4))
    write_rows(folder / "grpo.jsonl", [{"prompt": f"Say {i}"} for i in range(4)])
    for side, word in (("positive", "sad"), ("negative", "glad")):
        (folder / f"{side}.txt").write_text("".join(f"Be {word} about {i}.\n" for i in range(8)))


def found_of(run: str, output: Path) -> dict[str, Any]:
    """What a training run left behind; `moved`: the largest entry of any LoRA B, which begins at zero."""
    import mlx.core as mx

    if not (output / "metrics.jsonl").exists():
        return {}
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    tensors: Any = mx.load(str(output / "adapters.safetensors"))
    moved = max(float(mx.abs(x).max()) for name, x in tensors.items() if name.endswith("lora_b"))
    return {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "norms": [row["grad_norm"] for row in rows if "grad_norm" in row],
        "moved": moved,
        "notes": json.loads((output / "config.json").read_text()).get("notes", []),
    }


def main(named: str, *runs: str) -> int:
    """Run the commands; a JSON row each."""
    pretended_gpu.begin()
    arch = pretended_gpu.configured(named)
    import grid_models
    from train_tools import cache

    from mlx_realign import cli

    with tempfile.TemporaryDirectory() as name, cache(Path(name) / "cache"):
        folder = Path(name)
        model = grid_models.write_folder(folder / arch, arch)
        write_data(folder)
        for run in runs or RUNS:
            pretended_gpu.met.clear()
            start, raised = time.perf_counter(), ""
            try:
                code = cli.entry(words(run, folder, model))
            except (Exception, SystemExit) as error:
                code, raised = 1, f"{type(error).__name__}: {error}"
                traceback.print_exc()
            row = {"run": run, "code": code, "raised": raised, "kernels": dict(pretended_gpu.met)}
            row |= {"seconds": round(time.perf_counter() - start, 1), **found_of(run, folder / run)}
            print(f"\n=> {json.dumps(row)}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
