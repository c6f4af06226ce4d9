# SPDX-License-Identifier: Apache-2.0
"""Writes the backend tables of the guide and of the skill from backends.toml.

python docs/backends.py            (writes)
python docs/backends.py --check    (exit code 1 when a table is not what the data says)
"""

import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "docs/training-methods.md", ROOT / ".claude/skills/training-methods.md")
BEGIN, END = "<!-- made from docs/backends.toml by docs/backends.py -->", "<!-- end -->"


def load() -> dict[str, Any]:
    """columns, and cells as they stand in the file."""
    return tomllib.loads((ROOT / "docs/backends.toml").read_text(encoding="utf-8"))


def render(data: dict[str, Any]) -> str:
    """The matrix, method x column, and below it the evidence of each group of cells."""
    columns = data["columns"]
    levels = {(method, cell["column"]): cell["level"] for cell in data["cells"] for method in cell["methods"]}
    methods = list(dict.fromkeys(method for method, _ in levels))
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {m} | " + " | ".join(levels[m, column] for column in columns) + " |" for m in methods]
    lines += ["", "Evidence:", ""]
    for column in columns:
        for cell in (cell for cell in data["cells"] if cell["column"] == column):
            proof = f" ({', '.join(f'`{path}`' for path in cell['proof'])})" if cell["proof"] else ""
            lines.append(f"- {column}, {', '.join(cell['methods'])}: **{cell['level']}**; {cell['evidence']}{proof}.")
    return "\n".join(lines)


def placed(text: str, table: str) -> str:
    """The page with its table replaced."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


def main(argv: list[str]) -> int:
    """Write, or with --check compare."""
    table, stale = render(load()), []
    for page in PAGES:
        old = page.read_text(encoding="utf-8")
        new = placed(old, table)
        if old != new:
            stale.append(str(page.relative_to(ROOT)))
            if "--check" not in argv:
                page.write_text(new, encoding="utf-8")
    print("\n".join(f"{'stale' if '--check' in argv else 'written'}: {page}" for page in stale) or "up to date")
    return int(bool(stale) and "--check" in argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
