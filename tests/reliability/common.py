# SPDX-License-Identifier: Apache-2.0
"""What the scripts of this folder share: a tiny model, rows of every method, runs in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

JUDGE = """
def share(completion, row, argument=""):
    letters = [c for c in completion if c.isalpha()]
    return sum(c in "aeiou" for c in letters) / len(letters) if letters else 0.0
"""
METHODS = ("sft", "dpo", "cpo", "orpo", "kto", "grpo", "rlvr")
FAST = ["--learning-rate", "1e-3", "--batch-size", "2", "--lora-rank", "4"]
ONLINE = [*FAST, "--group-size", "4", "--max-new-tokens", "6", "--zero-variance", "keep"]
WORDS = ("yes", "well", "it is so", "nobody knows", "two and two", "rain")


def rows_of(method: str, count: int = 12) -> list[dict[str, object]]:
    """Rows that a method trains on, of unequal length."""
    made: list[dict[str, object]] = []
    for i in range(count):
        prompt = f"Say {i}." + " Think." * (i % 3)
        good, bad = WORDS[i % 6] * (1 + i % 3), WORDS[(i + 1) % 6] * (1 + i % 2)
        if method == "sft":
            made.append({"prompt": prompt, "completion": good})
        elif method == "kto":
            made.append({"prompt": prompt, "completion": good if i % 2 else bad, "label": bool(i % 2)})
        elif method in ("grpo", "rlvr"):
            made.append({"prompt": prompt} if method == "grpo" else {"problem": prompt, "solution": good})
        else:
            made.append({"prompt": prompt, "chosen": good, "rejected": bad})
    return made


class Bench:
    """A folder with a model, rows and a judge; `words` is the command line of a run with them."""

    def __init__(self, folder: Path, arch: str = "llama") -> None:
        from conftest import CHATML, write_model_folder

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.model = write_model_folder(folder / arch, arch, 0, CHATML)
        (folder / "judge.py").write_text(JUDGE)
        for method in METHODS:
            (folder / f"{method}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(method)))

    def words(self, method: str, output: Path, *more: object) -> list[str]:
        """`python -m mlx_realign.train ...`."""
        judged = ["--verifier", f"{self.folder / 'judge.py'}:share"] if method in ("grpo", "rlvr") else []
        usual = [*ONLINE, *judged] if method in ("grpo", "rlvr") else FAST
        named = ["--method", method, "--model", self.model, "--data", self.folder / f"{method}.jsonl"]
        return [sys.executable, "-m", "mlx_realign.train", *map(str, [*named, "--output", output, *usual, *more])]

    def start(self, words: list[str], cache: str | Path = "cache") -> subprocess.Popen[str]:
        """The process of a command."""
        env = os.environ | {"MLX_REALIGN_CACHE": str(self.folder / cache), "HF_HUB_OFFLINE": "1"}
        pipe = subprocess.PIPE
        return subprocess.Popen(words, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, errors="replace")


def table(head: list[str], rows: list[list[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
