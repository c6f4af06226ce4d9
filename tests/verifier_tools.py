# SPDX-License-Identifier: Apache-2.0
"""Calls a verifier in this process, where its packages are installed, and programs by each way of confining them."""

import functools
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_realign.verifiers import Refused, sandbox

PACKAGES = {"math": "math_verify", "json_schema": "jsonschema", "reasoning_gym": "reasoning_gym"}


def module(name: str) -> Any:
    """The file of a verifier."""
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return importlib.import_module(f"mlx_realign.verifiers.{name}")


def judge(name: str, completion: str, row: dict[str, Any], argument: str = "") -> float | str | None:
    """The score, or the reason of a refusal."""
    try:
        return module(name).verify(completion, row, argument)
    except Refused as refused:
        return refused.reason


def checked(name: str, row: dict[str, Any], argument: str = "") -> str:
    """What is wrong with the row, or ""."""
    return module(name).check(row, argument) or ""


@functools.cache
def way(name: str) -> sandbox.Route | str:
    """That way of confining, tried once; or why it does not hold here."""
    try:
        return sandbox.Route(name, sandbox._probe(name), "")
    except (OSError, ValueError) as error:
        return f"{name}: {error}"


@pytest.fixture(params=["root", "user", "calls"] if sys.platform == "linux" else ["seatbelt"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way of confining that this machine has, one after the other."""
    if request.param not in sandbox.candidates():
        pytest.skip("for the other kind of user")
    found = way(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    monkeypatch.setattr(sandbox, "route", lambda: found)
    return request.param


def children() -> set[int]:
    """Processes whose parent is this one."""
    lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    return {int(word) for text in lists for word in text.split()}
