# SPDX-License-Identifier: Apache-2.0
"""Files that come from elsewhere, looked at before a library reads them: what they are, and what their headers claim.

A pipe or a device in the place of a file would never end, and MLX's readers believe what a header says. Whatever is
looked at here costs less than a second and some tens of megabytes, however large the file is.
"""

import json
import stat
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

HEADER_BYTES = 16 << 20  # a file with 100,000 tensors needs less
JSON_BYTES = 16 << 20
DEEP = 64
LARGEST = 1 << 63
NAME_CHARS = 1000
ITEM_BITS = {"BOOL": 8, "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
ITEM_BITS |= {f"{kind}{bits}": bits for kind in "IU" for bits in (8, 16, 32, 64)} | {"C64": 64, "F4": 4}


class Tensor(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def require_regular(path: Path) -> int:
    """The size of a file in bytes. ValueError where it is a pipe, a device, a folder; OSError where it is not there."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"it is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')} and no file")
    return found.st_size


def refuse_odd_entries(folder: Path) -> None:
    """ValueError for the first entry of a folder that is neither a file nor a folder."""
    for entry in folder.iterdir():
        if entry.exists() and not (entry.is_file() or entry.is_dir()):
            raise ValueError(f"{entry.name} is a pipe or a device and no file")


def read_json(path: Path, most: int = JSON_BYTES) -> Any:
    """A JSON file. ValueError where it is none, or too large or too deep to be one of ours; OSError."""
    if (size := require_regular(path)) > most:
        raise ValueError(f"it has {size} bytes, more than any such file needs")
    return parse(path.read_bytes())


def parse(text: bytes | str) -> Any:
    """JSON. ValueError where it is none, or too deep for Python or for other readers of it."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are too deep") from None
    level = [found] if isinstance(found, dict | list) else []
    for _ in range(DEEP):
        inner = (one.values() if isinstance(one, dict) else one for one in level)
        level = [x for values in inner for x in values if type(x) in (dict, list)]
        if not level:
            return found
    raise ValueError("its brackets are too deep")


def safetensors_header(path: Path, most: int | None = None) -> dict[str, Tensor]:
    """Name -> what the header says, the file proven to hold just that. ValueError says what is wrong; OSError.

    most: tensors that such a file can have.
    """
    size = require_regular(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"it has {size} bytes, and its header alone claims {length}")
        if length > (limit := HEADER_BYTES if most is None else min(HEADER_BYTES, (most + 64) * NAME_CHARS)):
            raise ValueError(f"its header has {length} bytes, more than the {limit} that such a file can need")
        header = parse(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    if most is not None and len(header) > most:
        raise ValueError(f"it holds {len(header)} tensors; such a file has at most {most}")
    spans = []
    found = {}
    for name, entry in header.items():
        if len(name) > NAME_CHARS:
            raise ValueError(f"a tensor's name has {len(name)} characters")
        found[name], span = _tensor(name, entry)
        spans.append((*span, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ValueError(f"tensor {name!r} begins at byte {start}, and the one before it ends at {end}")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"it has {size} bytes, its header promises {8 + length + end}")
    return found


def _tensor(name: str, entry: Any) -> tuple[Tensor, tuple[int, int]]:
    """One entry of a header and the bytes it stands at."""
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets") from None
    if {type(x) for x in numbers} != {int} or min(numbers) < 0 or start >= LARGEST or max(shape, default=0) >= 1 << 31:
        raise ValueError(f"tensor {name!r}: its shape or its place is no list of such numbers")
    bits = ITEM_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise ValueError(f"tensor {name!r}: unknown dtype {dtype!r}")
    if len(shape) > 32 or prod(shape) * bits != 8 * (stop - start):
        raise ValueError(f"tensor {name!r}: shape and dtype need other than the {stop - start} bytes it has")
    return Tensor(dtype, tuple(shape)), (start, stop)
