# SPDX-License-Identifier: Apache-2.0
"""The result of `mac.py` as Markdown to paste into an issue: a table for each part, and what is not there, with why.

python benchmarks/mac_page.py mac-report/result.json
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
MEASURED = ("setup", "tests", "checks", "peers", "memory", "traces", "steady", "limits")


def page(result: dict[str, Any]) -> str:
    """All of it."""
    parts = result["parts"]
    lines = [f"## mlx-realign on {machine(result)}", "", summary(result), ""]
    shown = {"tests": tests, "checks": checks, "peers": peers, "memory": memory, "traces": traces, "steady": steady,
             "limits": limits}  # fmt: skip
    for name, show in shown.items():
        if name not in parts:
            continue
        entries = parts[name]["entries"]
        lines += [f"### {name}", ""]
        if parts[name]["reason"]:
            lines += [f"{parts[name]['status']}: {parts[name]['reason']}", ""]
        done = [entry for entry in entries if entry["status"] == "done"]
        lines += [*show(done), ""] if done else []
        lines += [*missing(entries), ""]
    while lines and not lines[-1]:
        lines.pop()
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def facts(result: dict[str, Any]) -> dict[str, Any]:
    """What part `setup` found, in one dict."""
    told: dict[str, Any] = {}
    for entry in result["parts"].get("setup", {"entries": []})["entries"]:
        told |= entry["found"] or {}
    return told


def machine(result: dict[str, Any]) -> str:
    """Chip, cores, memory."""
    told = facts(result)
    size = told.get("memory_bytes", told.get("memory_kib", 0) * 1024) / 2**30  # as machines are sold
    gpu = f", {told['gpu_cores']} GPU cores" if "gpu_cores" in told else ""
    system = f", macOS {told['macos']}" if "macos" in told else ""
    return f"{told.get('chip', 'an unknown chip')}, {told.get('cores', '?')} cores{gpu}, {size:.0f} GB{system}"


def summary(result: dict[str, Any]) -> str:
    """Versions, power, commit, how it ended."""
    told = facts(result)
    versions = ", ".join(f"{name} {version}" for name, version in told.get("versions", {}).items() if version)
    device = told.get("device_info", {})
    limit = device.get("max_recommended_working_set_size")
    changed = " (changed)" if result.get("changed") else ""
    words = [
        f"`{result['kind']}` run of commit {str(result.get('commit'))[:12]}{changed}",
        versions,
        f"on {told['device']}" if "device" in told else "",
        f"recommended working set {limit / 1e9:.1f} GB" if limit else "",
        f"power: {told['power_source']}" if "power_source" in told else "",
        "low-power mode" if told.get("low_power_mode") else "",
        f"ended early by {result['ended_by']}" if result.get("ended_by") else "",
    ]
    return "; ".join(filter(None, words)) + "."


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [[cell(value) for value in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *cells]]


def cell(value: Any) -> str:
    """A value, short; `-` where there is none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def missing(entries: list[Entry]) -> list[str]:
    """A line for each that has no number."""
    lines = []
    for entry in entries:
        if entry["status"] != "done":
            what = ", ".join(f"{key} {value}" for key, value in entry["of"].items() if value not in (None, False))
            lines.append(f"- {what}: {entry['status']}, {entry['reason']}")
    return lines


def tests(done: list[Entry]) -> list[str]:
    """Counts, and the failures."""
    keys = ("tests", "passed", "failed", "errors", "skipped")
    rows = [[e["of"]["tests"], *(e["found"][key] for key in keys), e["seconds"]] for e in done]
    lines = table(("kind", *keys, "seconds"), rows)
    for entry in done:
        for name, last in entry["found"]["failures"].items():
            lines.append(f"- {name}: `{(last or ['?'])[-1]}`")
    return lines


def checks(done: list[Entry]) -> list[str]:
    """Self-checks, shares, and the sentences that were said."""
    keys = ("compiled_share", "padding_share", "mask_free_share", "estimated_peak_memory_gb", "estimated_time_s")
    rows = []
    for e in done:
        found = e["found"]
        said = "; ".join(f"{name} {told}" for name, told in found.get("self_check", {}).items())
        rows.append([e["of"]["model"], e["of"]["grad-checkpoint"], said, *(found.get(key) for key in keys)])
    lines = table(("model", "checkpointed", "self-check", *(key.replace("_", " ") for key in keys)), rows)
    notes = {f"- {e['of']['model']}: {note}" for e in done for note in e["found"]["notes"]}
    return [*lines, *(["", *sorted(notes)] if notes else [])]


def peers(done: list[Entry]) -> list[str]:
    """Medians, beside what was published."""
    keys = ("tokens_per_second", "iterations_per_second", "peak_memory_gb", "resident_gb_largest")
    found = [e for e in done if e["of"].get("median")]
    rows = [[e["of"]["row"], e["of"]["who"], *(e["found"][key] for key in keys), e["published"]] for e in found]
    return table(("run", "who", "tokens/s", "it/s", "peak GB", "resident GB", "published"), rows)


def memory(done: list[Entry]) -> list[str]:
    """Peaks by length, and the fits."""
    lengths: dict[tuple[str, int], dict[str, Any]] = {}
    for e in done:
        if "by" in e["of"]:
            lengths.setdefault((e["of"]["method"], e["of"]["tokens"]), {})[e["of"]["by"]] = e["found"]
    rows = []
    for (method, tokens), by in lengths.items():
        step, dry, plan = by.get("step", {}), by.get("dry run", {}), by.get("plan", {})
        guesses = dry.get("estimated_peak_memory_gb"), plan.get("peak_memory_gb", plan.get("estimated_peak_memory_gb"))
        rows.append([method, tokens, step.get("peak_memory_gb"), *guesses, step.get("tokens_per_second")])
    lines = table(("method", "tokens", "measured GB", "dry run GB", "plan GB", "tokens/s"), rows)
    fits = [[e["of"]["method"], *e["found"].values()] for e in done if "fit" in e["of"]]
    names = next((list(e["found"]) for e in done if "fit" in e["of"]), [])
    return [*lines, "", *table(("method", *(n.replace("_", " ") for n in names)), fits)] if fits else lines


def traces(done: list[Entry]) -> list[str]:
    """Planned for Metal, and run."""
    keys = ("shapes", "compiled_share", "padding_share", "recomputed_share", "mask_free_share", "tokens_per_second")
    keys += ("resident_gb_settled", "resident_gb_last", "resident_gb_largest")
    rows = [[f"{e['of']['steps']} steps" if "steps" in e["of"] else "plan for Metal", e["of"]["method"],
             *(e["found"].get(key) for key in keys)] for e in done]  # fmt: skip
    return table(("what", "method", *(key.replace("_", " ") for key in keys)), rows)


def steady(done: list[Entry]) -> list[str]:
    """Speeds by minute."""
    rows = [[e["of"]["tokens"], e["found"]["span_s"], ", ".join(map(cell, e["found"]["tokens_per_second"])),
             e["found"]["last_over_first"]] for e in done]  # fmt: skip
    return table(("tokens", "seconds each", "tokens/s, one span after the other", "last : first"), rows)


def limits(done: list[Entry]) -> list[str]:
    """Whether it fits."""
    keys = ("fits", "peak_memory_gb", "tokens_per_second", "resident_gb_largest")
    rows = [[e["of"]["machine"], e["of"]["memory-limit"], e["of"]["tokens"], e["of"]["grad-checkpoint"],
             *(e["found"][key] for key in keys)] for e in done]  # fmt: skip
    head = ("machine", "limit GB", "tokens", "checkpointed", "fits", "peak GB", "tokens/s", "resident GB")
    return table(head, rows)


if __name__ == "__main__":
    sys.stdout.write(page(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
