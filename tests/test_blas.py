# SPDX-License-Identifier: Apache-2.0
"""No library computes for MLX before it has proved itself apart; what dies, lies or hangs is passed over and told."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_realign import blas, cli, elf
from mlx_realign.policy import Policy
from mlx_realign.train import train

pytestmark = [
    pytest.mark.skipif(platform.system() != "Linux", reason="MLX brings a fast BLAS on macOS"),
    pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler"),
]

PLAIN = """
#include <unistd.h>
#define GEMM(name, T) void name(int order, int ta, int tb, int m, int n, int k, T alpha, const T *a, int lda, \\
    const T *b, int ldb, T beta, T *c, int ldc) { calls++; BODY(T) }
#define BODY(T) for (int i = 0; i < m; i++) for (int j = 0; j < n; j++) { T sum = 0; \\
    for (int l = 0; l < k; l++) sum += a[ta == 112 ? l * lda + i : i * lda + l] * B_AT; \\
    c[i * ldc + j] = alpha * sum + (beta ? beta * c[i * ldc + j] : 0); }
int calls;
GEMM(cblas_sgemm, float)
GEMM(cblas_dgemm, double)
"""
TRANSPOSED, NOT = "b[tb == 112 ? j * ldb + l : l * ldb + j]", "b[l * ldb + j]"
SOURCES = {
    "good": PLAIN.replace("B_AT", TRANSPOSED),
    "wrong": PLAIN.replace("B_AT", NOT),  # right but where its second matrix is transposed
    "deadly": "void cblas_sgemm(void) { __builtin_trap(); }",
    "hanging": "#include <unistd.h>\nvoid cblas_sgemm(void) { for (;;) pause(); }",
    "empty": "int nothing;",
    "picky": "#include <stdlib.h>\n"  # as a library whose kernels for this processor are broken
    + PLAIN.replace("int calls;", "int calls; static int plain;")
    .replace("B_AT", TRANSPOSED)
    .replace("calls++;", "if (!plain) __builtin_trap();")
    + '__attribute__((constructor)) void load(void) { plain = getenv("OPENBLAS_CORETYPE") != 0; }',
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("libraries")
    for name, source in SOURCES.items():
        (folder / f"{name}.c").write_text(source)
        command = [
            "cc",
            "-O3",
            "-ffast-math",
            "-shared",
            "-fPIC",
            "-w",
            "-o",
            f"{folder}/{name}.so",
            f"{folder}/{name}.c",
        ]
        subprocess.run(command, check=True)
    return {name: str(folder / f"{name}.so") for name in SOURCES}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_REALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(code: str, **variables: str) -> str:
    """Standard output of a fresh process, which must end well."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


MULTIPLY = """
import mlx_realign, mlx.core as mx
from mlx_realign import blas, cli, elf
a = mx.arange(6.0).reshape(2, 3)
print((a @ a.T).tolist(), blas.in_use().path, "|", blas.in_use().line())
"""
PRODUCT = "[[5.0, 14.0], [14.0, 50.0]]"  # by hand


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("deadly", f"ended its process with signal {4 if platform.machine() == 'x86_64' else 5}"),
        ("wrong", "multiplies wrongly"),
        ("empty", "has no function cblas_sgemm"),
        ("absent", "is not there"),
    ],
)
def test_what_fails_its_proof_is_passed_over_and_named(libraries: dict[str, str], name: str, fault: str) -> None:
    planted = libraries.get(name, "/nowhere/libblas.so")
    said = run(MULTIPLY, MLX_REALIGN_BLAS=planted)
    assert said.startswith(PRODUCT) and f"{planted} {fault}" in said
    assert planted not in said.split("|")[0]


def test_what_hangs_is_ended_and_tried_again_another_day(libraries: dict[str, str], cache: Path) -> None:
    hanging = blas.Candidate("it", libraries["hanging"])
    assert blas.prove(hanging, limit_s=2)["fault"] == "did not end within 2 s"
    assert blas.prove(hanging, limit_s=1)["fault"] == "did not end within 2 s"  # known, not tried
    [file] = (cache / "blas").glob("*.json")
    os.utime(file, (0, 0))
    assert blas.prove(hanging, limit_s=1)["fault"] == "did not end within 1 s"


def test_what_passes_is_what_mlx_calls(libraries: dict[str, str], cache: Path) -> None:
    # It has neither products of complex numbers nor decompositions: MLX's own serve those.
    code = (
        MULTIPLY
        + "print(blas.in_use().library and __import__('ctypes').c_int.in_dll(blas.in_use().library, 'calls').value)"
    )
    said = run(code, MLX_REALIGN_BLAS=libraries["good"]).splitlines()
    assert said[0].startswith(f"{PRODUCT} {libraries['good']} ") and int(said[1]) > 0
    [file] = (cache / "blas").glob("*.json")
    verdict = json.loads(file.read_text())
    assert verdict["path"] == libraries["good"] and verdict["prefix"] == ""


def test_without_any_mlx_computes_by_itself_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "candidates", lambda: iter(()))
    monkeypatch.setattr(blas, "_in_use", blas.InUse("", "", None, "", ()))
    assert blas.load_fast_blas().library is None
    monkeypatch.setattr(blas, "warned", "")
    with pytest.warns(UserWarning, match="BLAS") as told:
        policies = [Policy.load("tiny-chat") for _ in range(2)]
    assert told[0].filename == __file__
    [line] = [note for note in policies[0].notes if "BLAS" in note]
    assert [str(one.message) for one in told] == [line] and line in policies[1].notes  # told once
    assert "MLX's own" in line and "pip install 'mlx-realign[cpu]'" in line
    blas.set_threads(1)  # nothing to set, nothing raised
    assert blas.threads() is None


def test_a_command_tells_it_among_its_notes_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(blas, "warned", "")
    monkeypatch.setattr(blas, "_in_use", blas.in_use()._replace(rejected=("it does not end",)))
    words = ["--model", "tiny-chat", "--prompt", "Hi", "--max-new-tokens", "1"]
    assert cli.entry(["generate", *words]) == 0
    assert capsys.readouterr().err.count("it does not end") == 1
    assert not [one for one in recwarn if "BLAS" in str(one.message)] and not blas.warned


def test_a_run_from_python_does_not_tell_it_a_second_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blas, "warned", "")
    monkeypatch.setattr(blas, "_in_use", blas.in_use()._replace(rejected=("it does not end",)))
    with pytest.warns(UserWarning, match="it does not end"):
        train(method="sft", model="tiny-chat", data=[{"prompt": "Hi", "completion": "Yes."}], dry_run=True)
    captured = capsys.readouterr()
    assert "it does not end" not in captured.err + captured.out


def test_a_long_proof_says_so_and_ctrl_c_ends_it_in_one_line(libraries: dict[str, str]) -> None:
    command = [sys.executable, "-m", "mlx_realign.generate", "--help"]
    variables = os.environ | {"MLX_REALIGN_BLAS": libraries["hanging"]}
    asked = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert asked.stderr
    said = asked.stderr.readline()
    assert said == f"BLAS: proving {libraries['hanging']} in a process of its own, once per machine: up to 30 s ...\n"
    [child] = Path(f"/proc/{asked.pid}/task/{asked.pid}/children").read_text().split()
    asked.send_signal(signal.SIGINT)  # to it alone: a terminal would tell the child too
    output, errors = asked.communicate(timeout=20)
    assert (asked.returncode, output, errors) == (130, "", "interrupted\n")
    deadline = time.monotonic() + 10  # killed; gone once whoever inherited it has looked
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists()


def test_plainer_kernels_serve_where_those_of_the_processor_fail(
    libraries: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    every = [blas.Candidate("it", libraries["picky"], kernels) for kernels in ("", "Prescott")]
    monkeypatch.setattr(blas, "candidates", lambda: iter(every))
    monkeypatch.setattr(blas, "_in_use", blas.InUse("", "", None, "", ()))
    try:
        found = blas.load_fast_blas()
        assert found.path == libraries["picky"] and "it ended its process" in found.rejected[0]
        assert (mx.array([[2.0, 3.0]]) @ mx.array([[5.0], [7.0]])).item() == 31  # and it does not die here
        assert "OPENBLAS_CORETYPE" not in os.environ
    finally:
        monkeypatch.undo()
        elf.bind(blas.in_use().path)


def test_a_preloaded_library_that_is_wrong_is_not_called(libraries: dict[str, str]) -> None:
    own = "import sys; sys.modules['scipy_openblas32'] = None\n" + MULTIPLY
    for variables in ({}, {"MLX_REALIGN_BLAS": "mlx"}):
        said = run(own, LD_PRELOAD=libraries["wrong"], **variables)
        assert said.startswith(PRODUCT) and libraries["wrong"] not in said.split("|")[0]


def test_what_this_moment_forbids_is_no_verdict_on_the_library(cache: Path) -> None:
    frozen = "import sys; sys.frozen = True\n" + MULTIPLY
    assert "cannot be tried out" in run(frozen)
    assert "scipy-openblas32" in run(MULTIPLY)
    odd = "import sys, pathlib; sys.path.append(pathlib.Path('/tmp'))\n" + MULTIPLY
    assert "scipy-openblas32" in run(odd, OPENBLAS_NUM_THREADS="2")  # another key: it is proved anew


def test_mlx_s_own_can_be_asked_for() -> None:
    said = run(MULTIPLY, MLX_REALIGN_BLAS="mlx")
    assert said.startswith(PRODUCT) and "MLX's own" in said and "pip" not in said


def test_it_serves_after_mlx_has_multiplied_already() -> None:
    before = "import mlx.core as mx; x = mx.ones((3, 3)) @ mx.ones((3, 3)); mx.eval(x)\n"
    said = run(before + MULTIPLY)
    assert said.startswith(PRODUCT) and "scipy-openblas32" in said


def test_it_chooses_its_kernels_when_it_runs() -> None:
    code = "import mlx_realign; from mlx_realign import blas; print(blas.in_use().line())"
    if platform.machine() == "x86_64":
        assert "scipy-openblas32, Haswell kernels" in run(code, OPENBLAS_CORETYPE="Haswell")
        assert "Sandybridge kernels" in run(code, OPENBLAS_CORETYPE="Sandybridge")
    else:
        assert "ARMV8 kernels" in run(code, OPENBLAS_CORETYPE="ARMV8")


def test_a_verdict_is_kept_by_library_and_processor(libraries: dict[str, str], cache: Path) -> None:
    library = Path(libraries["good"]).with_name("copy.so")
    shutil.copy(libraries["good"], library)
    candidate = blas.Candidate("it", str(library))
    assert "fault" not in blas.prove(candidate)
    shutil.copy(libraries["wrong"], library)  # another file under the same name
    assert "multiplies wrongly" in blas.prove(candidate)["fault"]
    library.unlink()
    assert blas.prove(candidate)["fault"] == "is not there"


@pytest.mark.parametrize("spoiled", ["", "{}", '{"path": 3}', "[]"])
def test_a_damaged_verdict_is_made_again(libraries: dict[str, str], cache: Path, spoiled: str) -> None:
    candidate = blas.Candidate("it", libraries["empty"])
    verdict = blas.prove(candidate)
    assert verdict == {"fault": "has no function cblas_sgemm"}
    [file] = (cache / "blas").glob("*.json")
    file.write_text(spoiled)
    assert blas.prove(candidate) == verdict and json.loads(file.read_text()) == verdict


def test_two_processes_at_once_and_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    several = [subprocess.Popen([sys.executable, "-c", MULTIPLY], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert all("scipy-openblas32" in child.communicate()[0] and child.returncode == 0 for child in several)
    (tmp_path / "file").touch()
    assert "scipy-openblas32" in run(MULTIPLY, MLX_REALIGN_CACHE=str(tmp_path / "file" / "below"))


def test_threads_are_those_that_are_set() -> None:
    before = blas.threads() or 1
    for count in (2, 1):
        blas.set_usual_threads(count)
        assert blas.threads() in (count, 1)  # 1: on a machine with one core
    blas.set_threads(2)
    assert blas.threads() == 1  # never more than usual
    blas.set_usual_threads(before)
    a = np.random.default_rng(0).integers(-9, 9, (300, 200)).astype(np.float32)
    np.testing.assert_array_equal(np.array(mx.array(a) @ mx.array(a.T)), a.astype(np.int64) @ a.T.astype(np.int64))
