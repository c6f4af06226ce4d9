# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
"""Reads a GGUF control vector with the packages gguf and repeng, and prints what they find as one line of JSON.

pip install gguf==0.19.0 repeng==0.4.0
"""

import json
import sys
from importlib.metadata import version

from gguf import GGUFReader
from repeng import ControlVector

path = sys.argv[1]
reader = GGUFReader(path)
fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
tensors = {
    t.name: {"type": t.tensor_type.name, "shape": t.shape.tolist(), "values": t.data.tolist()} for t in reader.tensors
}
types = {name: [kind.name for kind in field.types] for name, field in reader.fields.items()}
peer = ControlVector.import_gguf(path)
repeng = {"model_type": peer.model_type, "layers": {str(k): v.tolist() for k, v in peer.directions.items()}}
print(json.dumps({"version": version("gguf"), "fields": fields, "types": types, "tensors": tensors, "repeng": repeng}))
