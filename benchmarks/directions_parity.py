# SPDX-License-Identifier: Apache-2.0
"""Directions of mlx-realign against those of repeng and steering-vectors: same model, same prompts, block by block.

    python benchmarks/smollm2.py
    python benchmarks/directions_parity.py --model FOLDER --peers VENV [--pairs 64]

VENV has repeng, steering-vectors and gguf (the drivers in `peer_drivers/` say which and how). Prompts are everyday
questions asked in a cheerful and in a gloomy voice, rendered with the model's chat template; the state is that of the
last token. Vectors must agree to a cosine of 0.999 in every block, sign included. What has to be known:

- repeng's `pca_diff` is our `pca` with variant "centred", its `pca_center` our "pair_centred"; it has no block 0.
- Its last layer is what transformers calls the last hidden state, which is after the model's final norm. Ours is
  before it, as is that of steering-vectors. So for repeng's last layer our states go through the norm first.
- Its components come from a randomised solver without a seed: "itself" is how much two of its own runs agree.

Then a control vector is written here and read by the gguf package and by repeng, and one of repeng's is read here.
Table, then one line of JSON; ends with 1 where something does not agree.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import launch
import mlx.core as mx
import numpy as np

from mlx_realign import capture, directions, gguf_vectors
from mlx_realign.policy import Policy
from mlx_realign.vectors import About, Direction

HERE = Path(__file__).parent
LEAST = 0.999
VOICES = ("You are in a wonderful mood and very cheerful.", "You are in a terrible mood and very gloomy.")
REPENG = {"pca_diff": "centred", "pca_center": "pair_centred"}


def contrast(count: int) -> list[tuple[str, str]]:
    """(cheerful, gloomy) prompts that ask the same question; at most as many as there are questions."""
    lines = (HERE / "one_sentence_prompts.txt").read_text().splitlines()
    questions = [line for line in lines if line and not line.startswith("#")]
    step = len(questions) / count
    chosen = [questions[int(i * step)] for i in range(min(count, len(questions)))]
    return [(f"{VOICES[0]} {question}", f"{VOICES[1]} {question}") for question in chosen]


def write(pairs: list[tuple[str, str]], policy: Policy, path: Path) -> int:
    """The pairs as the texts that peers tokenise; returns our number of tokens."""
    rows, tokens = [], 0
    for pair in pairs:
        talks = [[{"role": "user", "content": prompt}] for prompt in pair]
        options = {"tokenize": False, "add_generation_prompt": True}
        texts = [policy.tokenizer.apply_chat_template(talk, **options) for talk in talks]
        rows.append(dict(zip(("positive", "negative"), texts, strict=True)))
        tokens += sum(map(len, capture.encode(policy, pair)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tokens


def drive(venv: Path, driver: str, *flags: Any) -> dict[str, Any]:
    """What a driver prints last."""
    text, _, _ = launch.run([venv / "bin/python", HERE / "peer_drivers" / driver, *map(str, flags)])
    return launch.last_json(text)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def ours(states: tuple[np.ndarray, np.ndarray], method: str, **options: Any) -> dict[int, np.ndarray]:
    """Block -> vector, from states [n, 1 + blocks, d] of both sets."""
    blocks = range(states[0].shape[1] - 1)
    return {b: directions.extract(method, states[0][:, b + 1], states[1][:, b + 1], **options) for b in blocks}


def normed(policy: Policy, states: np.ndarray) -> np.ndarray:
    """States with those of the last block after the model's final norm."""
    model: Any = policy.model
    last = np.array(model.model.norm(mx.array(states[:, -1])))
    return np.concatenate([states[:, :-1], last[:, None]], 1)


def compare(policy: Policy, a: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Name -> {block: cosine} for each method of each peer."""
    pairs = contrast(a.pairs)
    tokens = write(pairs, policy, folder / "pairs.jsonl")
    sides = [capture.encode(policy, [pair[side] for pair in pairs]) for side in (0, 1)]
    collected = [capture.collect(policy, prompts)[:, :, 0] for prompts in sides]
    states = collected[0], collected[1]
    after = normed(policy, states[0]), normed(policy, states[1])
    given = ("--model", a.model, "--data", folder / "pairs.jsonl", "--output", folder / "peer.npz")
    found: dict[str, Any] = {}
    for name, variant in REPENG.items():
        said = drive(
            a.peers, "run_repeng.py", *given, "--method", name, "--rounds", 2, "--gguf", folder / f"{name}.gguf"
        )
        assert said["tokens"] == tokens, f"repeng reads {said['tokens']} tokens, we {tokens}"
        theirs, mine = dict(np.load(folder / "peer.npz")), ours(after, "pca", variant=variant)
        layers = sorted(int(key) for key in theirs if not key.startswith("again."))
        found[f"repeng {name}"] = {b: cosine(mine[b], theirs[str(b)]) for b in layers}
        found[f"repeng {name}, itself"] = {b: abs(cosine(theirs[f"again.{b}"], theirs[str(b)])) for b in layers}
    said = drive(a.peers, "run_steering_vectors.py", *given, "--batch", 8)
    assert said["tokens"] == tokens, f"steering-vectors reads {said['tokens']} tokens, we {tokens}"
    theirs, mine = dict(np.load(folder / "peer.npz")), ours(states, "mean_difference")
    found["steering-vectors mean"] = {int(b): cosine(mine[int(b)], theirs[b]) for b in theirs}
    ratios = [float(np.linalg.norm(mine[int(b)]) / np.linalg.norm(theirs[b])) for b in theirs]
    found["steering-vectors mean, length"] = {int(b): min(r, 1 / r) for b, r in zip(theirs, ratios, strict=True)}
    return found | {"gguf": control_vectors(policy, ours(states, "mean_difference"), a, folder)}


def control_vectors(
    policy: Policy, vectors: dict[int, np.ndarray], a: argparse.Namespace, folder: Path
) -> dict[str, bool]:
    """Claim -> whether it holds."""
    path = folder / "ours.gguf"
    blocks = gguf_vectors.write(Direction(vectors, About(base_model=policy.name)), path, model_type="llama")
    said = drive(a.peers, "read_gguf.py", path)
    fields, tensors, exact = said["fields"], said["tensors"], {str(b): vectors[b].astype(np.float32) for b in blocks}
    back = gguf_vectors.read(folder / "pca_diff.gguf")
    theirs = drive(a.peers, "read_gguf.py", folder / "pca_diff.gguf")["repeng"]["layers"]
    return {
        "architecture": fields["general.architecture"] == "controlvector",
        "model hint": fields["controlvector.model_hint"] == "llama",
        "layer count": fields["controlvector.layer_count"] == len(blocks),
        "layer count is uint32": said["types"]["controlvector.layer_count"] == ["UINT32"],
        "names": sorted(tensors) == sorted(f"direction.{b}" for b in blocks),
        "float32 [d]": all(t["type"] == "F32" and t["shape"] == [len(vectors[0])] for t in tensors.values()),
        "values": all((exact[b] == tensors[f"direction.{b}"]["values"]).all() for b in exact),
        "repeng reads ours": all((exact[b] == said["repeng"]["layers"][b]).all() for b in exact),
        "we read repeng's": all((back.vectors[int(b)] == v).all() for b, v in theirs.items()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a llama in float32, as smollm2.py makes it")
    default = os.environ.get("PEER_STEERING")
    parser.add_argument("--peers", type=Path, default=default, required=default is None, metavar="VENV")
    parser.add_argument("--pairs", type=int, default=64)
    a = parser.parse_args()
    a.peers = a.peers.absolute()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Policy.load(a.model), a, Path(folder))
    claims = found.pop("gguf")
    lines = [("cosine", "blocks", "least: 1 -", "at block")]
    for name, values in found.items():
        at = min(values, key=lambda b: values[b])
        lines.append((name, f"{min(values)} to {max(values)}", f"{1 - values[at]:.1e}", str(at)))
    print(launch.table(lines))
    print("\n".join(f"gguf: {claim}: {'yes' if holds else 'NO'}" for claim, holds in claims.items()))
    low = [name for name, values in found.items() if "itself" not in name and min(values.values()) < LEAST]
    print(json.dumps({"pairs": a.pairs, "cosines": found, "gguf": claims, "below": low}))
    return int(bool(low) or not all(claims.values()))


if __name__ == "__main__":
    sys.exit(main())
