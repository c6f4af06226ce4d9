# SPDX-License-Identifier: Apache-2.0
"""Damaged and hostile files given to every reader of files from elsewhere: vectors, adapters, model folders.

    python tests/reliability/bad_files.py                 (the table of hostile files; seconds)
    python tests/reliability/bad_files.py --random 200    (and 200 random damages of each kind of file; minutes)

A case passes where the reader ends with one message (UserError) of at most 4,000 characters, or, for a random damage,
reads the file: within `SECONDS`, with at most `MEGABYTES` more memory, and with the process alive. Exit code 1 where
one does not. The cases run in a process of their own, which is started again behind a case that ends it.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlx_realign import adapter, adapter_patterns, loading, vectors
from mlx_realign.errors import UserError
from mlx_realign.policy import Policy

SECONDS = float(os.environ.get("BAD_FILES_SECONDS", "2"))  # of this process's own time, so that load does not count
HUNG_SECONDS = 60
MEGABYTES = 400
LONGEST = 4000
NUMBERS = (0, 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
DEEP = b"[" * 1_000_000
TINY = Path(loading.__file__).parent / "assets" / loading.EMBEDDED
WEIGHTS, PEFT_WEIGHTS, CONFIG = "adapters.safetensors", "adapter_model.safetensors", "adapter_config.json"
LORA = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 0.0}}
PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
Damage = Callable[[Path], object]  # done to the one file, or folder, of a case


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header (a dict, or the bytes of it); length: what it claims to have."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(*shape: int, at: int = 0, dtype: str = "F32", size: int | None = None) -> dict[str, Any]:
    """An entry of such a header."""
    count = 4 * int(np.prod(shape)) if size is None else size
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + count]}


def said(text: str | bytes) -> bytes:
    """A string as GGUF has it."""
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf(  # noqa: PLR0913
    version: int = 3,
    tensors: int = 1,
    keys: int = 1,
    facts: bytes = said("general.architecture") + struct.pack("<I", 8) + said("controlvector"),
    name: str | bytes = "direction.1",
    shape: tuple[int, ...] = (64,),
    kind: int = 0,
    offset: int = 0,
    body: int = 256,
) -> bytes:
    """A control vector with one thing wrong with it."""
    info = said(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + facts + info + struct.pack("<IQ", kind, offset)
    return head + b"\0" * (-len(head) % 32) + np.ones(body // 4, np.float32).tobytes()


def fact(kind: int, value: bytes, key: str | bytes = "general.alignment") -> bytes:
    return said(key) + struct.pack("<I", kind) + value


HEADERS = {  # of safetensors files
    "empty": b"",
    "header of 2^63 bytes": safetensors({}, length=1 << 63),
    "header of 2^64 - 1 bytes": safetensors({}, length=(1 << 64) - 1),
    "header beyond the file": safetensors({}, length=1000),
    "no JSON": safetensors(b"\xff" * 64),
    "a list": safetensors(b"[1, 2]"),
    "brackets without end": safetensors(DEEP),
    "braces 1,000 deep": safetensors(b'{"a":' * 1000 + b"1" + b"}" * 1000),
    "a number of a million digits": safetensors(b'{"a":' + b"9" * 1_000_000 + b"}"),
    "overlapping": safetensors({"a": tensor(4), "b": tensor(4, at=8)}, bytes(24)),
    "descending": safetensors({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, bytes(16)),
    "a hole": safetensors({"a": tensor(4), "b": tensor(4, at=32)}, bytes(48)),
    "bytes behind": safetensors({"a": tensor(4)}, bytes(32)),
    "ends behind the file": safetensors({"a": tensor(1 << 30)}, bytes(64)),
    "a shape of other size": safetensors({"a": tensor(1000, size=16)}, bytes(16)),
    "a shape that wraps": safetensors({"a": tensor(1 << 33, 1 << 31, size=16)}, bytes(16)),
    "negative shape": safetensors({"a": tensor(-4, -1, size=16)}, bytes(16)),
    "shape of words": safetensors({"a": {"dtype": "F32", "shape": "ab", "data_offsets": [0, 8]}}, bytes(8)),
    "true for a number": safetensors({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
    "unknown dtype": safetensors({"a": tensor(4, dtype="Q9")}, bytes(16)),
    "dtype of a list": safetensors({"a": {"dtype": [], "shape": [4], "data_offsets": [0, 16]}}, bytes(16)),
    "a key of 5 MB": safetensors({"k" * 5_000_000: tensor(4)}, bytes(16)),
    "a path of 5 MB": safetensors({"layers." * 700_000 + "lora_a": tensor(4)}, bytes(16)),
    "digits of any alphabet": safetensors({"model.layers.²." + "9" * 5000 + ".lora_a": tensor(4)}, bytes(16)),
    "50,000 tensors": safetensors({f"model.layers.{i}.lora_a": tensor(0) for i in range(50_000)}),
    "1,000,000 tensors": safetensors(b"{" + b",".join(b'"%d":{}' % i for i in range(1_000_000)) + b"}"),
}
GGUF = {
    "empty": b"",
    "other magic": b"GGML" + gguf()[4:],
    "big-endian": gguf(version=3 << 24),
    "version 99": gguf(version=99),
    "2^63 tensors": gguf(tensors=1 << 63),
    "2^63 keys": gguf(keys=1 << 63),
    "one key too many": gguf(keys=2),
    "one tensor too many": gguf(tensors=2),
    "a name of 2^63 bytes": gguf(facts=struct.pack("<Q", 1 << 63)),
    "a name that is no text": gguf(name=b"\xff\xfe"),
    "unknown value type": gguf(facts=fact(77, bytes(8))),
    "an array of arrays": gguf(facts=fact(9, struct.pack("<IQ", 9, 1 << 40))),
    "an array of 2^63 numbers": gguf(facts=fact(9, struct.pack("<IQ", 4, 1 << 63))),
    "an array of 2^63 strings": gguf(facts=fact(9, struct.pack("<IQ", 8, 1 << 63))),
    "a string beyond the file": gguf(facts=fact(8, struct.pack("<Q", 1 << 62))),
    "alignment 0": gguf(facts=fact(4, struct.pack("<I", 0))),
    "alignment of text": gguf(facts=fact(8, said("x"))),
    "5 dimensions": gguf(shape=(2,) * 5),
    "2^32 - 1 dimensions": gguf()[:-256].replace(struct.pack("<IQ", 1, 64), struct.pack("<IQ", (1 << 32) - 1, 64)),
    "a matrix": gguf(shape=(8, 8)),
    "2^63 wide": gguf(shape=(1 << 63,)),
    "wraps around": gguf(shape=(1 << 33, 1 << 33)),
    "of an unknown type": gguf(kind=200),
    "quantised": gguf(kind=2),
    "offset beyond the file": gguf(offset=1 << 40),
    "offset that wraps": gguf(offset=(1 << 64) - 64),
    "cut": gguf(body=128),
    "block 0": gguf(name="direction.0"),
    "a block of 5 MB": gguf(name="direction." + "9" * 5_000_000),
    "no block": gguf(name="direction.²"),
    "a model": gguf(name="blk.0.attn_q.weight"),
    "NaN": gguf()[:-256] + np.full(64, np.nan, np.float32).tobytes(),
}
PLACES: dict[str, Damage] = {  # what else can stand where a file is meant
    "a pipe": lambda path: os.mkfifo(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
}
CONFIGS: dict[str, Any] = {  # of an adapter of mlx-lm; None: of PEFT, see PATTERNS
    "a pipe": PLACES["a pipe"],
    "a device": PLACES["a device"],
    "no object": [],
    "not JSON": b"{",
    "brackets without end": DEEP,
    "20 MB": b'"' + b"x" * 20_000_000 + b'"',
    "parameters of text": LORA | {"lora_parameters": "rank scale dropout"},
    "rank 0": LORA | {"lora_parameters": {"rank": 0, "scale": 1.0, "dropout": 0.0}},
    "rank NaN": LORA | {"lora_parameters": {"rank": float("nan"), "scale": 1.0, "dropout": 0.0}},
    "rank 10^400": LORA | {"lora_parameters": {"rank": 10**400, "scale": 1.0, "dropout": 0.0}},
    "scale infinite": LORA | {"lora_parameters": {"rank": 2, "scale": float("inf"), "dropout": 0.0}},
    "dropout 5": LORA | {"lora_parameters": {"rank": 2, "scale": 1.0, "dropout": 5}},
    "a kind of 5 MB": LORA | {"fine_tune_type": "k" * 5_000_000},
}
PATTERNS: dict[str, Any] = {  # of PEFT's rank_pattern
    "no object": ["q_proj"],
    "without end": {r"([\w.]+)+!": 2},
    "without end, by choices": {"(m|m)(o|o)(d|d)(e|e)(l|l)" + r"(\w|\w|\.)*" * 30 + "!": 2},
    "nested without end": {"(" * 50_000: 2},
    "a repetition of 2^32": {"a{4294967294}": 2},
    "no expression": {"*": 2},
    "a key of 5 MB": {"(" + "k" * 5_000_000: 2},
    "100,000 patterns": {f"({i})": 2 for i in range(100_000)},
    "a rank of text": {"q_proj": "2"},
}
MODELS: dict[str, Any] = {  # keys of config.json that are replaced, or the file itself
    "not JSON": b"{",
    "no object": b"[]",
    "brackets without end": DEEP,
    "20 MB": b'"' + b"x" * 20_000_000 + b'"',
    "10^7 layers": {"num_hidden_layers": 10_000_000},
    "10^7 experts": {"num_local_experts": 10_000_000},
    "10^12 wide": {"hidden_size": 10**12},
    "0 heads": {"num_attention_heads": 0},
    "a type of 5 MB": {"model_type": "k" * 5_000_000},
    "a type that is a path": {"model_type": "../../x"},
    "a vocabulary of 10^12": {"vocab_size": 10**12},
}
INDEXES = {
    "a path upwards": {"weight_map": {"a": "../../../etc/passwd"}},
    "a path of 10,000 folders": {"weight_map": {"a": "x/" * 10_000 + "model.safetensors"}},
    "a shard that is not there": {"weight_map": {"a": "model-00002-of-00002.safetensors"}},
}


def content(given: Any) -> bytes:
    return given if isinstance(given, bytes) else json.dumps(given).encode()


def writes(data: bytes) -> Damage:
    return lambda path: path.write_bytes(data)


def adapter_folder(folder: Path, weights: str, damage: Damage, config: Any) -> None:
    """An adapter whose weights are damaged (None: whole)."""
    folder.mkdir()
    config(folder / CONFIG) if callable(config) else (folder / CONFIG).write_bytes(content(config))
    damage(folder / weights)


def model_folder(folder: Path, name: str, damage: Damage) -> None:
    """tiny-chat with one file replaced by what `damage` makes."""
    shutil.copytree(TINY, folder)
    (folder / name).unlink(missing_ok=True)
    damage(folder / name)


def one_lora(path: Path) -> None:
    """The weights of an adapter of one layer, for PEFT."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    path.write_bytes(safetensors({name.format("A"): tensor(2, 4), name.format("B"): tensor(4, 2, at=32)}, bytes(64)))


def cases() -> Iterator[tuple[str, str, str, Damage]]:
    """(kind, name of the case, name of its file, what makes it); each is to be refused."""
    for name, damage in (PLACES | {n: writes(data) for n, data in HEADERS.items()}).items():
        yield "vector", name, "v.safetensors", damage
        yield "adapter", name, "a", partial(adapter_folder, weights=WEIGHTS, damage=damage, config=LORA)
        yield "peft", name, "p", partial(adapter_folder, weights=PEFT_WEIGHTS, damage=damage, config=PEFT)
        yield "model", f"weights: {name}", "m", partial(model_folder, name="model.safetensors", damage=damage)
    for name, damage in (PLACES | {n: writes(data) for n, data in GGUF.items()}).items():
        yield "gguf", name, "v.gguf", damage
    for name, config in CONFIGS.items():
        yield (
            "adapter",
            f"config: {name}",
            "a",
            partial(
                adapter_folder,
                weights=WEIGHTS,
                damage=writes(safetensors({"a.lora_a": tensor(4)}, bytes(16))),
                config=config,
            ),
        )
    for name, patterns in PATTERNS.items():
        config = PEFT | {"rank_pattern": patterns}
        yield (
            "peft",
            f"pattern: {name}",
            "p",
            partial(adapter_folder, weights=PEFT_WEIGHTS, damage=one_lora, config=config),
        )
    whole = json.loads((TINY / "config.json").read_text())
    for name, keys in MODELS.items():
        data = keys if isinstance(keys, bytes) else content(whole | keys)
        yield "model", f"config: {name}", "m", partial(model_folder, name="config.json", damage=writes(data))
    for name, index in INDEXES.items():
        file = "model.safetensors.index.json"
        yield "model", f"index: {name}", "m", partial(model_folder, name=file, damage=writes(content(index)))
    for file in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        yield "model", f"{file}: a pipe", "m", partial(model_folder, name=file, damage=PLACES["a pipe"])


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """A good file with some bytes exchanged, cut out or put in, most of them in its head."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        at = int(rng.integers(min(len(out), 400 if rng.random() < 0.8 else len(out))))
        kind = rng.integers(4)
        if kind == 0:
            out[at] = int(rng.integers(256))
        elif kind == 1:
            out[at : at + 8] = struct.pack("<Q", NUMBERS[rng.integers(len(NUMBERS))])
        elif kind == 2:
            del out[at : at + int(rng.integers(1, 64))]
        else:
            out[at:at] = rng.bytes(int(rng.integers(1, 32)))
        if not out:
            break
    return bytes(out)


def random_cases(count: int, seed: int) -> Iterator[tuple[str, str, str, Damage]]:
    """As `cases`; what is damaged by chance may also be read."""
    good = safetensors({"direction.1": tensor(64), "__metadata__": {"a": "b"}}, bytes(256))
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        yield "gguf", f"random {i}", "v.gguf", writes(damaged(gguf(), rng))
        yield "vector", f"random {i}", "v.safetensors", writes(damaged(good, rng))
        damage = writes(damaged(good, rng))
        yield "adapter", f"random {i}", "a", partial(adapter_folder, weights=WEIGHTS, damage=damage, config=LORA)


def child(args: argparse.Namespace) -> None:
    """Goes through the cases from `--first` on; a line before and a line after each."""
    adapter_patterns.SECONDS = 1.0
    policy = Policy.load(loading.EMBEDDED)
    read = {"adapter": policy.load_adapter, "peft": policy.load_adapter, "model": loading.load}
    with tempfile.TemporaryDirectory() as folder:
        for i, (kind, name, file, make) in enumerate([*cases(), *random_cases(args.random, args.seed)]):
            if i < args.first or args.only not in f"{kind}: {name}":
                continue
            make(path := Path(folder) / file)
            print(json.dumps({"case": i, "name": f"{kind}: {name}"}), flush=True)
            signal.alarm(HUNG_SECONDS)  # ends the process wherever it is
            peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            try:
                read.get(kind, vectors.load)(str(path))
                told = "read"
                adapter.set_enabled(policy.model, True)
            except UserError as error:
                told = f"refused: {error}"
            except Exception as error:
                told = f"{type(error).__name__}: {error}"[:300]
            took, grown = time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
            print(json.dumps({"case": i, "told": told, "seconds": took, "megabytes": grown / 1024}), flush=True)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def wrong(name: str, row: dict[str, Any]) -> str | None:
    """What is wrong with how a case ended."""
    told = row["told"]
    if not told.startswith("refused") and not (told == "read" and "random" in name):
        return told
    if len(told) > LONGEST:
        return f"a message of {len(told)} characters"
    if row["seconds"] > SECONDS:
        return f"{row['seconds']:.1f} s"
    return f"{row['megabytes']:.0f} MB" if row["megabytes"] > MEGABYTES else None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the cases and prints those that failed, and a line about all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=0, help="random damages of each kind of file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--verbose", action="store_true", help="every case and its message")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args)
        return 0
    first, failed, done, began = 0, 0, 0, time.monotonic()
    while True:
        words = ["--child", "--random", args.random, "--seed", args.seed, "--only", args.only, "--first", first]
        name, open_case = "before the first case", -1
        command = [sys.executable, __file__, *map(str, words)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout and process.stderr
            for line in process.stdout:
                row = json.loads(line)
                if "name" in row:
                    name, open_case = row["name"], row["case"]
                    continue
                done, open_case = done + 1, -1
                fault = wrong(name, row)
                failed += fault is not None
                if fault or args.verbose:
                    print(f"{'FAILED' if fault else 'ok'}  {name}: {fault or row['told'][:300]}", flush=True)
            said_last = process.stderr.read()[-300:]
        if process.returncode == 0:
            break
        failed += 1
        print(f"FAILED  {name}: ended the process ({process.returncode}): {said_last}", flush=True)
        if open_case < 0:
            break
        first = open_case + 1
    print(f"{done} files in {time.monotonic() - began:.0f} s, {failed} failed")
    return 1 if failed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
