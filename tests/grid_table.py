# SPDX-License-Identifier: Apache-2.0
"""Measures every architecture of the grid and writes the table of docs/models.md, or of docs/numerics.md.

python tests/grid_table.py                    (minutes; what is in the work folder already is not measured again)
python tests/grid_table.py --fresh            (measures all again)
python tests/grid_table.py llama gemma3       (measures these again, and writes the table of all there are)
python tests/grid_table.py --gpu              (the same under a pretended GPU, for docs/numerics.md)

The work folder is build/grid, or build/grid-gpu: one JSON per architecture.
"""

import json
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import mlx_realign  # noqa: F401  # before mlx: it loads a fast BLAS

ROOT = Path(__file__).parent.parent
PAGE, WORK = ROOT / "docs/models.md", ROOT / "build/grid"
GPU_PAGE, GPU_WORK = ROOT / "docs/numerics.md", ROOT / "build/grid-gpu"
SUMMARY, TABLE = "<!-- counted by tests/grid_table.py -->", "<!-- made by tests/grid_table.py -->"
GPU_TABLE = "<!-- made by tests/grid_table.py --gpu -->"
END = "<!-- end -->"
HEAD = ["model", "trains", "checkpointing", "rollout", "steering", "generated alone", "ablation", "worst"]
# The cells of a column: all must be right.
COLUMNS = {
    "trains": ["log-probs", "gradient", "gradient, rows alone"],
    "checkpointing": ["gradient, checkpointed"],
    "rollout": ["rollout"],
    "steering": ["steering"],
    "generated alone": ["steering, generated"],
    "ablation": ["ablation"],
}
LIMIT = 1e-4


def measured(arch: str, gpu: bool = False) -> dict[str, Any]:
    """What was found, from the work folder or now."""
    file = (GPU_WORK if gpu else WORK) / f"{arch}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        lost = {"way": "", "notes": [], "kernels": {}, "traces": 0, "cells": {"log-probs": "fails: the process ended"}}
        file.write_text(json.dumps(lost))  # it stays where the process is killed
        file.write_text(json.dumps(_measure(arch, gpu), indent=1))
        print(arch, flush=True)
    return json.loads(file.read_text())


def _measure(arch: str, gpu: bool) -> dict[str, Any]:
    if gpu:
        from pretended_gpu import row

        return row(arch)
    from grid_checks import measure

    with tempfile.TemporaryDirectory() as folder:
        return measure(arch, Path(folder))


def verdict(cells: list[Any]) -> tuple[str, str]:
    """(yes, no or wrong; the line that says why) of the cells of a column."""
    for cell in cells:
        if isinstance(cell, str):
            word, _, line = cell.partition(": ")
            return {"refused": "no", "fails": "**fails**"}[word], line
    wrong = [cell for cell in cells if not cell <= LIMIT]
    return ("yes", "") if cells and not wrong else ("**wrong**", f"off by {max(wrong, default=0):.0e}")


def summary(found: dict[str, dict[str, Any]]) -> str:
    """How many work in all columns, in some and in none; which; and the largest difference of all."""
    kinds: dict[str, list[str]] = {"full": [], "part": [], "none": []}
    worst, where = 0.0, "none"
    for arch, one in found.items():
        words = [_column(one, name)[0] for name in COLUMNS]
        kinds["full" if set(words) == {"yes"} else "part" if "yes" in words else "none"].append(f"`{arch}`")
        numbers = _numbers(one)
        if numbers and max(numbers) > worst:
            worst, where = max(numbers), arch
    full, part, none = kinds.values()
    said = (
        f"Of {len(found)} models {len(full)} work in every column, {len(part)} in some ({', '.join(part)}) and "
        f"{len(none)} are refused ({', '.join(none)}). The largest difference is {worst:.0e} (`{where}`)."
    )
    return textwrap.fill(said, 120, break_on_hyphens=False)


def table(found: dict[str, dict[str, Any]]) -> str:
    """A row per architecture, then the lines that rows refer to by number."""
    lines, reasons = [_row(HEAD), _row(["---"] * len(HEAD))], {}
    for arch, one in found.items():
        lines.append(_row([f"`{arch}`", *_cells(one, reasons)]))
    lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines)


def gpu_table(found: dict[str, dict[str, Any]]) -> str:
    """How many train, how many are compiled, then models by what they meet on a GPU: kernels, traces."""
    groups: dict[tuple[str, str], list[str]] = {}
    for arch, one in found.items():
        groups.setdefault(gpu_row(one), []).append(f"`{arch}`")
    trains = sum(len(some) for (_, traces), some in groups.items() if traces != "refused")
    compiled = sum(len(some) for (_, traces), some in groups.items() if traces.isdecimal() and traces != "0")
    numbers = {arch: max(_numbers(one), default=0.0) for arch, one in found.items()}
    top = max(numbers, key=lambda arch: numbers[arch])
    said = (
        f"Of {len(found)} models {trains} train, {compiled} of these by compiled steps; the others are refused. The "
        f"largest difference is {numbers[top]:.0e} (`{top}`)."
    )
    order = sorted(groups, key=lambda group: (group[1] == "refused", group[0] != "-", group[0], -len(groups[group])))
    rows = [_row([*group, ", ".join(groups[group])]) for group in order]
    head = ["kernels met", "traces", "models"]
    return "\n".join([textwrap.fill(said, 120, break_on_hyphens=False), "", _row(head), _row(["---"] * 3), *rows])


def gpu_row(one: dict[str, Any]) -> tuple[str, str]:
    """(kernels met, traces) of a row under a pretended GPU; "refused" or "wrong" where it does not train."""
    word, _ = _column(one, "trains")
    kernels = ", ".join(f"`{name}`" for name in sorted(one["kernels"])) or "-"
    return kernels, {"yes": str(one["traces"]), "no": "refused"}.get(word, "wrong")


def _numbers(one: dict[str, Any]) -> list[float]:
    return [cell for cell in one["cells"].values() if not isinstance(cell, str)]


def _cells(one: dict[str, Any], reasons: dict[str, int]) -> list[str]:
    said = []
    for name in COLUMNS:
        word, line = _column(one, name)
        if name == "trains" and word == "yes":
            word = one["way"]
            line = next((n for n in one["notes"] if n.startswith(("prompts are not", "only prompts"))), "")
            line = line.partition(": ")[2]
        line = line.removeprefix("--model MODEL: ")
        number = f" ({reasons.setdefault(line, len(reasons) + 1)})" if line else ""
        said.append(word + number)
    numbers = _numbers(one)
    return [*said, f"{max(numbers):.0e}" if numbers else "-"]


def _column(one: dict[str, Any], name: str) -> tuple[str, str]:
    return verdict([one["cells"][part] for part in COLUMNS[name] if part in one["cells"]])


def put(text: str, begin: str, made: str) -> str:
    """The page with what stands between a mark and the next end exchanged."""
    before, mark, rest = text.partition(begin)
    assert mark and END in rest, f"the page has no {begin}"
    return f"{before}{begin}\n{made}\n{END}{rest.partition(END)[2]}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: list[str]) -> int:
    """Measure what is missing, write the page, count what is wrong."""
    if gpu := "--gpu" in argv:
        import pretended_gpu

        pretended_gpu.begin()  # before mlx_lm is imported
    from grid_models import ARCHITECTURES

    again = ARCHITECTURES if "--fresh" in argv else [word for word in argv if word in ARCHITECTURES]
    for arch in again:
        ((GPU_WORK if gpu else WORK) / f"{arch}.json").unlink(missing_ok=True)
    found = {arch: measured(arch, gpu) for arch in sorted(ARCHITECTURES, key=str.lower)}
    made = {GPU_TABLE: gpu_table(found)} if gpu else {SUMMARY: summary(found), TABLE: table(found)}
    page = GPU_PAGE if gpu else PAGE
    text = page.read_text(encoding="utf-8")
    for mark, between in made.items():
        text = put(text, mark, between)
    page.write_text(text, encoding="utf-8")
    every = [(arch, name, cell) for arch, one in found.items() for name, cell in one["cells"].items()]
    bad = [f"{arch}, {name}: {cell}" for arch, name, cell in every if _bad(cell)]
    print("\n".join(bad))
    print(f"{len(found)} architectures, {len(bad)} cells that are neither right nor refused")
    return int(bool(bad))


def _bad(cell: Any) -> bool:
    return not cell.startswith("refused: ") if isinstance(cell, str) else not cell <= LIMIT


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
