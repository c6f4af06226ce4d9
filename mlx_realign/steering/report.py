# SPDX-License-Identifier: Apache-2.0
"""What `steer extract` and `steer eval` tell: facts for --json, remarks for the terminal, Markdown for the file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import steerability
from ..policy import Policy
from ..vectors import spans
from .pairs import Contrast

if TYPE_CHECKING:
    from .extract import Extracted, Settings


def facts(found: "Extracted", settings: "Settings", contrast: Contrast) -> dict[str, Any]:
    """What `steer extract --json` prints."""
    about = found.direction.about
    return {
        "output": settings.output,
        "model": about.base_model,
        "method": about.method,
        "position": about.position,
        "blocks": list(about.blocks),
        "operator": about.operator,
        "positions": about.positions,
        "coefficient": about.coefficient,
        "prompts": [len(contrast.positive), len(contrast.negative)],
        "notes": contrast.notes,
        "prefix": found.prefix,
        "warning": found.warning,
        "measured": about.measured,
        "calibration": [one._asdict() for one in found.calibration.table] if found.calibration else [],
    }


def remarks(found: "Extracted", settings: "Settings", contrast: Contrast, policy: Policy) -> list[str]:
    """What is to be known beside the table, a sentence each."""
    direction, about = found.direction, found.direction.about
    lines = [f"warning: {found.warning}"] if found.warning else []
    lines += contrast.notes
    lines.append(f"{len(contrast.positive)} positive and {len(contrast.negative)} negative prompts, {about.method}")
    if found.prefix:
        text = policy.tokenizer.decode(found.prefix)
        lines.append(f"all completions begin with {text!r}: states were taken behind it (--no-prefix: before it)")
    where = f"block {spans(list(about.blocks))}, {about.operator}, positions {about.positions}"
    lines.append(f"meant for {where}")
    if found.calibration and about.coefficient is not None:
        share = about.coefficient * direction.norm(about.blocks[0]) / direction.median_norm[about.blocks[0]]
        lines.append(
            f"coefficient {about.coefficient:.3g}, {share:.0%} of the median state there: 95% of tokens move "
            f"by at most {found.calibration.kl:.2f} nats (asked for: {settings.kl_budget:g})"
        )
        if not found.calibration.reached:
            lines.append(
                f"warning: {settings.kl_budget:g} nats could not be met; try that coefficient before you use it"
            )
    lines.append(f"written to {settings.output}; use it: mlx-realign steer generate --steer {settings.output}")
    return lines


def extraction(found: "Extracted", settings: "Settings", contrast: Contrast, policy: Policy, plot: Path | None) -> str:
    """The report of an extraction, Markdown."""
    about = found.direction.about
    parts = [f"# {Path(settings.output).stem}: a direction of {about.base_model}"]
    parts.append("\n".join(f"- {line}" for line in remarks(found, settings, contrast, policy)))
    parts.append("## How well the two sets are told apart, block by block")
    agree = "pairs agree" if found.separations[0].paired else "random halves agree"
    head = ["block", "length", "of the median state", f"{agree} (cosine)", "d', held out", "AUROC, held out"]
    at = steerability.best(found.separations)
    rows = []
    for s in found.separations:
        mark = f"**{s.block}**" if s.block == at else str(s.block)
        numbers = [f"{s.norm:.3g}", f"{s.share:.1%}", interval(s.agreement), f"{s.d_prime:.2f}", interval(s.auroc)]
        rows.append([mark, *numbers])
    parts.append(table(head, rows))
    if plot:
        parts.append(f"![separation by block]({plot.name})")
    if found.calibration:
        parts.append(
            f"## Strength: the coefficient at which 95% of tokens move by about {settings.kl_budget:g} nats at most"
        )
        tried = [[f"{one.coefficient:.4g}", *(f"{x:.3f}" for x in one[1:])] for one in found.calibration.table]
        parts.append(table(["coefficient", "KL per token: 95th percentile", "mean", "largest"], tried))
        parts.append(f"KL(steered || base) in nats over {found.calibration.tokens} tokens that the base model says.")
    parts.append("## From")
    rest = {"model": about.base_model, "weights": about.base_hash, "data": about.data_hash, "position": about.position}
    parts.append(table(["what", "value"], [[name, f"`{value}`"] for name, value in rest.items()], numbers=False))
    return "\n\n".join(parts) + "\n"


def interval(value: Sequence[float]) -> str:
    """An estimate and its 95% interval."""
    middle, low, high = value
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A Markdown table; numbers stand to the right."""
    lines = [[" ".join(name.split()) for name in head], ["---:" if numbers else "---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
