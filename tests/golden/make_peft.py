# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Make `peft.safetensors`: the logits that torch PEFT computes for the folders of `peft_cases.py`.

    python -m venv V && V/bin/pip install torch==2.13.0 peft==0.21.2 transformers==5.23.0
    V/bin/python tests/golden/make_peft.py

    V/bin/python tests/golden/make_peft.py --base MODEL --adapter FOLDER --output FILE

computes those of any one adapter folder; the tests use it where torch is installed. float32, eager attention.
"""

import argparse
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from peft_cases import CASES, TOKENS, tensors_of, write_base, write_peft
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

HERE = Path(__file__).parent


def logits_of(base: Path, adapter: Path) -> torch.Tensor:
    """float32 [rows, columns, vocabulary] of TOKENS; every tensor of the folder must have found its place."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        bare = model(torch.tensor(TOKENS)).logits.clone()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
            model = PeftModel.from_pretrained(model, adapter).eval()
        found = model(torch.tensor(TOKENS)).logits
    assert (found - bare).abs().max() > 0.1, "the adapter changes nothing"
    return found.contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "adapter", "output"):
        parser.add_argument(f"--{name}", type=Path)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    if args.base:
        save_file({"logits": logits_of(args.base, args.adapter)}, args.output)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            base, adapter = (
                write_base(Path(folder) / case / "base", case),
                write_peft(Path(folder) / case / "peft", case),
            )
            found[case] = logits_of(base, adapter)
            saved = Path(folder) / case / "saved"
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            PeftModel.from_pretrained(model, adapter).save_pretrained(saved)
            names = set(load_file(saved / "adapter_model.safetensors"))
            print(case, tuple(found[case].shape), "named as PEFT names it:", names == set(tensors_of(case)))
    versions = {name: version(name) for name in ("torch", "peft", "transformers")}
    save_file(found, HERE / "peft.safetensors", versions)


if __name__ == "__main__":
    main()
