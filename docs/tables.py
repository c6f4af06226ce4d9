# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of the pages from data files: backends.toml into guide and skill, measured numbers into README.

python docs/tables.py            (writes)
python docs/tables.py --check    (exit code 1 when a table is not what the data says)

Numbers are the last line that `benchmarks/peers.py` prints, saved as benchmarks/baselines/peers-<machine>.json, the
lines of `mlx-realign demo --json`, saved as benchmarks/baselines/demo-<machine>.jsonl, and the last lines of
`benchmarks/ablation.py` and `benchmarks/extraction.py`, saved as benchmarks/baselines/directions-<machine>.jsonl.
"""

import json
import statistics
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BASELINES = ROOT / "benchmarks/baselines"
OURS = "mlx-realign"
END = "<!-- end -->"


def load_backends() -> dict[str, Any]:
    """columns, and cells as they stand in the file."""
    return tomllib.loads((ROOT / "docs/backends.toml").read_text(encoding="utf-8"))


def backends(data: dict[str, Any]) -> str:
    """The matrix, method x column, and below it the evidence of each group of cells."""
    columns = data["columns"]
    levels = {(method, cell["column"]): cell["level"] for cell in data["cells"] for method in cell["methods"]}
    methods = list(dict.fromkeys(method for method, _ in levels))
    lines = [row("method", *columns), row(*["---"] * (len(columns) + 1))]
    lines += [row(method, *(levels[method, column] for column in columns)) for method in methods]
    lines += ["", "Evidence:", ""]
    for column in columns:
        for cell in (cell for cell in data["cells"] if cell["column"] == column):
            proof = f" ({', '.join(f'`{path}`' for path in cell['proof'])})" if cell["proof"] else ""
            lines.append(f"- {column}, {', '.join(cell['methods'])}: **{cell['level']}**; {cell['evidence']}{proof}.")
    return "\n".join(lines)


def peers(found: dict[str, Any]) -> str:
    """One row per case: our seconds and those of the fastest peers; our peak memory and the leanest peer's."""
    head = ["seconds of a step (epoch: of it all)", "ours", "fastest in MLX", "fastest of all"]
    head += ["peak GB, ours", "leanest"]
    lines = [row(*head), row(*["---"] * len(head))]
    for case in found["cases"].values():
        ours = case["contestants"][OURS]
        others = {label: one for label, one in case["contestants"].items() if label != OURS}
        if not others:
            continue
        in_mlx = {label: one for label, one in others.items() if one["mlx_peak_gb"] is not None}
        times = [_least(field, "seconds", ours) for field in (in_mlx, others)]
        memory = (f"{ours['maxrss_gb']:.2f}", _least(others, "maxrss_gb", ours))
        lines.append(row(case["about"], f"{ours['seconds']:.2f}", *times, *memory))
    machine = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines += [
        "",
        f"{found['model']}, float32, on {machine['cores']} cores ({machine['processor']}), each run of ours",
    ]
    lines[-1] += f" beside one of a peer, median of {found['rounds']} rounds; memory is the process's peak. {packages}."
    return "\n".join([*lines, "Again: `python benchmarks/peers.py`, whose first lines say how."])


def _least(field: dict[str, Any], what: str, ours: dict[str, Any]) -> str:
    """The contestant with the least of something, how much, and how many times ours."""
    if not field:
        return "-"
    label = min(field, key=lambda label: field[label][what])
    return f"{field[label][what]:.2f}, {field[label][what] / ours[what]:.2f}x ({label})"


def demo(results: list[dict[str, Any]]) -> str:
    """One row per method of the demo: share of held-out replies before and after, seconds."""
    lines = [row("`make demo`", "what it should change", "before", "after", "seconds"), row(*["---"] * 5)]
    for one in results:
        before, after = (f"{one[when][one['goal']]:.0%}" for when in ("before", "after"))
        lines.append(row(one["method"], f"{one['goal']}: {one['changes']}", before, after, f"{one['seconds']:.0f}"))
    return "\n".join(lines)


def directions(search: dict[str, Any], extraction: dict[str, Any]) -> str:
    """The search for an ablation beside Heretic's, and directions from prompts beside repeng's."""
    lines = [row("directions", "ours", "theirs", "theirs : ours"), row(*["---"] * 4)]
    token, heretic = search["per_token"], f"Heretic {search['versions']['heretic']}"
    ours, theirs = 1e3 * token["s_per_token"], 1e3 * token["heretic_s"]
    told = "ms of a generated token, trials of an ablation"
    lines.append(row(told, f"{ours:.2f}", f"{theirs:.2f}, {heretic}", f"{theirs / ours:.2f}x"))
    took = search["as_good_after_s"]
    if took and all(took):
        end, typical = search["heretic"][-1][0], statistics.median(took)
        told = f"seconds to a front as good as that of {len(search['heretic'])} of its trials"
        spread = f"{end / max(took):.1f}x to {end / min(took):.1f}x, {len(took)} seeds"
        lines.append(row(told, f"{typical:.0f}", f"{end:.0f}, {heretic}", f"{end / typical:.2f}x ({spread})"))
    (_, mine), (peer, others) = extraction["runs"].items()
    seconds = [statistics.median(run["seconds"] for run in runs) for runs in (mine, others)]
    memory = [max(run["maxrss_gb"] for run in runs) for runs in (mine, others)]
    cells = [f"{s:.1f} ({gb:.2f} GB)" for s, gb in zip(seconds, memory, strict=True)]
    ratio = statistics.median(run["ratio"] for run in others)
    told = f"seconds for every block's direction, {extraction['pairs']} + {extraction['pairs']} prompts"
    lines.append(row(told, cells[0], f"{cells[1]}, {peer}", f"{ratio:.2f}x"))
    again = "The same model and cores. Again: `benchmarks/ablation.py`, `benchmarks/extraction.py`."
    return "\n".join([*lines, "", again])


def numbers(folder: Path = BASELINES) -> str:
    """Every table of measured numbers there are data for."""
    tables = []
    for path in sorted(folder.glob("demo-*.jsonl")):
        tables.append(demo([json.loads(line) for line in path.read_text().splitlines() if line.strip()]))
    tables += [peers(json.loads(path.read_text())) for path in sorted(folder.glob("peers-*.json"))]
    for path in sorted(folder.glob("directions-*.jsonl")):
        tables.append(directions(*(json.loads(line) for line in path.read_text().splitlines() if line.strip())))
    return "\n\n".join(tables)


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def placed(text: str, source: str, table: str) -> str:
    """The page with the table made from `source` replaced."""
    mark = begin(source)
    before, _, rest = text.partition(mark)
    return f"{before}{mark}\n{table}\n{END}{rest.partition(END)[2]}"


def begin(source: str) -> str:
    """The comment a table made from `source` begins with."""
    return f"<!-- made from {source} by docs/tables.py -->"


def main(argv: list[str]) -> int:
    """Write, or with --check compare."""
    made = {"docs/backends.toml": backends(load_backends()), "benchmarks/baselines": numbers()}
    stale = []
    for page in (ROOT / "README.md", ROOT / "docs/training-methods.md", ROOT / ".claude/skills/training-methods.md"):
        old = new = page.read_text(encoding="utf-8")
        for source, table in made.items():
            new = placed(new, source, table) if begin(source) in new else new
        if old != new:
            stale.append(page.relative_to(ROOT).as_posix())
            if "--check" not in argv:
                page.write_text(new, encoding="utf-8")
    print("\n".join(f"{'stale' if '--check' in argv else 'written'}: {page}" for page in stale) or "up to date")
    return int(bool(stale) and "--check" in argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
