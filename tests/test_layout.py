# SPDX-License-Identifier: Apache-2.0
"""The shape of the code: imports point down only, files and functions stay short, every folder is installed."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES, FUNCTION_LINES = 380, 70  # the aim is 350 and 60
PACKAGE_FILES = sorted([*(ROOT / "mlx_realign").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
PYTHON_FILES = sorted([*PACKAGE_FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])

# From the bottom up. A module imports from rows above its own and from its own row; what no row names is a command
# (it has a `main`) or the open top of the package.
LAYERS = [
    {"errors", "cache", "elf", "blas", "batch", "calls", "ends", "files", "flags", "gguf", "locks", "manners"}
    | {"noise", "owners", "packing", "reach"}
    | {"streams", "terminal", "untrusted", "workers"},
    {"kernels"},
    {"config", "losses", "advantages", "policy_gradient", "policy_terms", "sampling", "directions", "steerability"}
    | {"adapter", "arguments", "distributions", "fingerprint", "intervals"},
    {
        "loading",
        "unsupported",
        "head",
        "balance",
        "taps",
        "forward",
        "prompt_caches",
        "policy",
        "decoding",
        "stepping",
        "ways",
        "rollout",
        "capture",
    }
    | {"bench", "compiled", "writers", "vectors", "gguf_vectors", "verifiers", "data"},
    {"methods", "preference", "steering", "ablation"},
]
MLX_LM_USERS = {
    "policy",
    "loading",
    "forward",
    "prompt_caches",
    "decoding",
    "stepping",
    "adapter",
    "data",
    "generate",
    "kernels",
}


def module_of(path: Path) -> str:
    """`mlx_realign/data/formats.py` -> data, `kernels/exp.py` -> kernels, `mlx_realign/train.py` -> train."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__main__":
        return parts[-1]  # a command, wherever it lies
    return "kernels" if parts[0] == "kernels" else room(parts[1])


def room(module: str) -> str:
    """Files that share a room (adapter, adapter_files, adapter_layers ...; arguments ...) count as one module."""
    return next((one for one in ("adapter", "arguments") if module.startswith(f"{one}_")), module)


def layer(module: str) -> int:
    return next((i for i, row in enumerate(LAYERS) if module in row), len(LAYERS))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of each import, those for the type checker alone left out."""
    package = ["mlx_realign", *path.relative_to(ROOT).parts[:-1]] if module_of(path) == "kernels" else None
    package = package or list(path.relative_to(ROOT).parts[:-1])
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for node in ast.walk(branch)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *([node.module] if node.module else [])]
            yield from ((node.lineno, ".".join([*stem, name.name])) for name in node.names)


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down_only(path: Path):
    here = module_of(path)
    for line, name in imports(path):
        parts = name.split(".")
        assert parts[0] != "kernels", f"{path}:{line}: import mlx_realign.kernels; `kernels` is another project"
        if parts[0] != "mlx_realign" or len(parts) < 2:
            continue
        there = room(parts[1])
        if here == "__init__" or there in ("__version__", here):
            continue
        assert layer(there) <= layer(here), f"{path}:{line}: {here} stands below {there} and must not import it"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_few_files_know_mlx_lm(path: Path):
    here = module_of(path)
    if here in MLX_LM_USERS or path.parent.name in MLX_LM_USERS:
        return
    users = [f"line {line}: {name}" for line, name in imports(path) if name.split(".")[0] == "mlx_lm"]
    assert not users, f"{path} must reach mlx_lm through {sorted(MLX_LM_USERS)}: {users}"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short_and_licensed(path: Path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} does not say what it is"
    assert text.count("\n") <= FILE_LINES, f"{path} has {text.count(chr(10))} lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{path}:{node.lineno}: {node.name} has {length} lines"


def test_every_package_folder_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "mlx_realign").rglob("*.py") if "assets" not in path.parts}
    wanted = {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"mlx_realign.kernels"}
    assert set(settings["packages"]) == wanted


def test_the_folder_kernels_is_imported_under_the_package_name():
    import mlx_realign.kernels as kernels

    assert Path(kernels.__file__ or "").resolve().parent == ROOT / "kernels"


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_imported_is_a_declared_dependency(path: Path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [extra for extra in project["optional-dependencies"] if extra != "dev"]
    listed = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    declared = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in listed}
    for line, name in imports(path):
        top = name.split(".")[0]
        assert top in declared | {"mlx_realign"} | sys.stdlib_module_names, f"{path}:{line}: {top} is no dependency"


def test_version_is_a_literal_that_the_build_can_read():
    text = (ROOT / "mlx_realign" / "__init__.py").read_text()
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+[^"]*"$', text, re.M)
