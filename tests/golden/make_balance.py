# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Make `balance.json` and `balance.safetensors`: what Hugging Face computes of the load-balancing loss of experts.

    V/bin/python tests/golden/make_balance.py        # V as for make_trl.py

balance.json holds `function`: the loss of fixed router logits with and without a mask; and `model`: loss and auxiliary
loss of the tiny mixture of `mixture.py` over its rows, as a trainer weighs them: mean negative log-likelihood of the
completions' tokens plus the coefficient times the auxiliary loss. Inputs are each row without its last token, which
predicts nothing. The safetensors file holds gradients of that sum under their names in the model.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch
from mixture import COEFFICIENT, ROWS, fixed_logits, write_mixture
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

HERE = Path(__file__).parent
KEPT = (
    "embed_tokens.weight",
    "layers.0.self_attn.q_proj.weight",
    "layers.0.mlp.gate.weight",
    "layers.1.mlp.gate.weight",
)


def main() -> None:
    torch.set_num_threads(1)
    logits, mask = fixed_logits()
    layers = tuple(torch.tensor(layer) for layer in logits)
    found = {
        "all": float(load_balancing_loss_func(layers, 6, 2)),
        "masked": float(load_balancing_loss_func(layers, 6, 2, torch.tensor(mask))),
        "top 1": float(load_balancing_loss_func(layers, 6, 1, torch.tensor(mask))),
    }
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(write_mixture(Path(folder)), dtype=torch.float32)
    sequences = [(prompt, completion) for prompt, completions in ROWS for completion in completions]
    width = max(len(p) + len(c) - 1 for p, c in sequences)
    inputs, attention = torch.zeros((len(sequences), width), dtype=torch.long), torch.zeros((len(sequences), width))
    for i, (prompt, completion) in enumerate(sequences):
        row = torch.tensor([*prompt, *completion[:-1]])
        inputs[i, : len(row)], attention[i, : len(row)] = row, 1
    out = model(input_ids=inputs, attention_mask=attention.long(), output_router_logits=True)
    logps = out.logits.log_softmax(-1)
    total, count = torch.zeros(()), 0
    for i, (prompt, completion) in enumerate(sequences):
        at = torch.arange(len(completion)) + len(prompt) - 1
        total, count = total - logps[i, at, torch.tensor(completion)].sum(), count + len(completion)
    loss = total / count + COEFFICIENT * out.aux_loss
    loss.backward()
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if name.endswith(KEPT)}
    assert len(grads) == len(KEPT)
    content = {
        "made_with": {package: version(package) for package in ("transformers", "torch")},
        "function": found,
        "model": {"loss": loss.item(), "aux_loss": out.aux_loss.item(), "tokens": count},
    }
    (HERE / "balance.json").write_text(json.dumps(content, indent=1) + "\n")
    save_file(grads, HERE / "balance.safetensors")
    (HERE / "balance.safetensors").chmod(0o644)
    print(content)


if __name__ == "__main__":
    main()
