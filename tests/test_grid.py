# SPDX-License-Identifier: Apache-2.0
"""Every architecture of mlx-lm against stock mlx-lm: right to 1e-4, or refused in the one line that is expected.

Here those that stand for a kind; the others are slow. docs/models.md says the same.
"""

import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from docs_tools import tables
from grid_checks import LIMIT, measure
from grid_models import ARCHITECTURES, model_files
from grid_table import COLUMNS, PAGE, verdict

# One of each kind: plain, norms of queries, windows and caps, sinks and experts, latent attention, linear attention,
# states, convolutions, parts of several kinds, chunks, layers without attention, parallel blocks, positions that scale,
# lent keys, learned positions, experts that are modules.
QUICK = """llama qwen3 gemma3 gemma4 gpt_oss deepseek_v3 kimi_linear qwen3_next mamba2 nemotron_h jamba rwkv7 falcon_h1
lfm2 llama4 nemotron-nas gptj ministral3 afm7 gpt2 dbrx""".split()
METAL = "No Metal back-end"
# By architecture and check ("all": each of them), words of the line that refuses it. What is not here must work.
REFUSED: dict[str, dict[str, str]] = {
    "bitnet": {"all": METAL},
    "deepseek_v41": {"all": "Cannot calculate VJP"},
    "gear": {"all": "its tokenizer cannot be read"},  # transformers does not take its kinds of layers
    "gemma3n": {"all": "Gemma 3n is not supported"},
    "iquestloopcoder": {
        "gradient, checkpointed": "compute with the parts of their layers",
        **dict.fromkeys(["steering", "steering, generated", "ablation"], "never call it"),
    },
    "kimi_k3": {"gradient, checkpointed": "gradient checkpointing is off"},  # blocks that keep what others gave
    "longcat_flash": {"ablation": "by ways that are not known"},
    "longcat_flash_ngram": {"ablation": "by ways that are not known"},
    "muse_spark": {"all": METAL},
    "olmo": {"all": "ai2-olmo"},
    "phi3small": {"all": "Phi-3-small is not supported"},
    "prism_hadamard_qwen35": {"ablation": "by ways that are not known"},  # layers of a kind of its own
    "recurrent_gemma": {"all": "_no_grad"},
    "rwkv7": {"ablation": "by ways that are not known"},  # its first block norms the stream itself
    "talkie": {"ablation": "by ways that are not known"},  # every block adds the embeddings again
}


def found_in(page: Path) -> dict[str, dict[str, str]]:
    """The rows of docs/models.md by model."""
    (rows,) = tables(page.read_text(encoding="utf-8"))
    return {row["model"].strip("`"): row for row in rows}


def hold(arch: str, folder: Path) -> None:
    if mx.metal.is_available() and REFUSED.get(arch, {}).get("all") == METAL:
        pytest.skip("the page tells what a CPU refuses")
    found = measure(arch, folder)
    wrong = [line for name, cell in found["cells"].items() if (line := trouble(arch, name, cell))]
    assert not wrong, "\n".join(wrong)
    assert found["traced"] is not False, f"{arch} looks at its numbers"
    row = found_in(PAGE)[arch]
    for name, parts in COLUMNS.items():
        word, _ = verdict([found["cells"][part] for part in parts if part in found["cells"]])
        if name == "trains" and word == "yes":
            word = found["way"]
        said = row[name].partition(" (")[0]
        assert said == word, f"docs/models.md says `{said}` of {arch}, {name}, and it is `{word}`: make the table again"


def trouble(arch: str, name: str, cell: Any) -> str:
    """What is not as expected of a cell."""
    words = REFUSED.get(arch, {}).get(name) or REFUSED.get(arch, {}).get("all")
    if isinstance(cell, str):
        expected = words is not None and cell.startswith("refused: ") and words in cell
        return "" if expected else f"{arch}, {name}: {cell}"
    if words is not None:
        return f"{arch}, {name}: {cell:.1e}, and was refused ({words}): take it out of REFUSED"
    return "" if cell <= LIMIT else f"{arch}, {name}: differs by {cell:.1e}"


@pytest.mark.parametrize("arch", QUICK)
def test_a_kind_is_right_or_refused(arch: str, tmp_path: Path):
    hold(arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch not in QUICK])
def test_every_other_architecture_is_right_or_refused(arch: str, tmp_path: Path):
    hold(arch, tmp_path)


def test_the_page_has_a_row_for_every_model_file_of_mlx_lm():
    files = model_files()
    assert len(files) > 100 and "llama" in files and "solar_open" in files and "cache" not in files
    rows = found_in(PAGE)
    assert set(files) <= set(ARCHITECTURES), "grid_configs.toml has no config of these"
    assert set(rows) == set(ARCHITECTURES), "make the table again: python tests/grid_table.py"
    assert set(REFUSED) <= set(ARCHITECTURES)


def test_the_page_counts_its_own_rows_and_speaks_in_sentences():
    text, rows = PAGE.read_text(encoding="utf-8"), found_in(PAGE)
    refused = sum(row["worst"] == "-" for row in rows.values())
    some = sum(row["worst"] != "-" and any(cell.startswith("no") for cell in row.values()) for row in rows.values())
    top = " ".join(text.partition("- **trains**")[0].split())
    assert f"Of {len(rows)} models {len(rows) - some - refused} work in every column, {some} in some (" in top
    assert f") and {refused} are refused (" in top
    assert f"The largest difference is {max(float(r['worst']) for r in rows.values() if r['worst'] != '-'):.0e} " in top
    notes = re.findall(r"^\d+\. (.*)", text, re.M)
    assert len(notes) > 10
    for note in notes:
        for error in re.finditer(r"\b\w+Error: ", note):
            before = note[: error.start()]
            assert before.count("(") > before.count(")"), f"an error without words: {note}"
        assert not re.search(r"\b[Aa] [aeiou]\w+ model|\binf\b", note), note
        assert note.count("'") % 2 == 0 or "'s " in note, f"cut: {note}"
