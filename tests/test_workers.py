# SPDX-License-Identifier: Apache-2.0
"""Parts of a batch, evaluated side by side: by whom they are built, what a fault leaves, how a program ends."""

import subprocess
import sys
import threading

import mlx.core as mx
import pytest

from mlx_realign.workers import Workers

PROGRAM = """
import mlx_realign, mlx.core as mx
from mlx_realign.workers import Workers
f = mx.compile(lambda x: mx.exp(x) * 2 + x, shapeless=True)
crews = [Workers(2) for _ in range(8)]
for crew in crews:
    crew.each([1.0, 2.0], lambda x: f(mx.full((64, 64), x)).sum())
"""

THREAD = """
import threading, mlx_realign, mlx.core as mx
from mlx_realign.workers import known_thread
f = mx.compile(lambda x: mx.exp(x) * 2 + x, shapeless=True)
def work():
    known_thread()
    mx.eval(f(mx.ones((4, 4))))
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def test_a_program_whose_own_threads_compute_ends_with_its_own_code():
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", THREAD], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_program_that_used_compiled_functions_ends_with_its_own_code():
    for _ in range(3):  # an abort comes with every second run
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_parts_are_built_by_the_caller_in_order_and_come_back_in_order():
    built = []

    def build(part: int) -> mx.array:
        built.append((part, threading.get_ident()))
        return mx.ones(9999).sum() * part

    assert [x.item() for x in Workers(2).each([3, 1, 2], build)] == [29997, 9999, 19998]
    assert built == [(n, threading.get_ident()) for n in (3, 1, 2)]


def test_a_fault_of_one_part_is_the_callers_and_leaves_the_workers_fit():
    workers = Workers(2)
    with pytest.raises(ZeroDivisionError):
        workers.each([1, 0], lambda part: mx.ones((300, 300)).sum() * (1 / part))
    assert [x.item() for x in workers.each([1, 2], lambda part: mx.ones((3,)).sum() * part)] == [3, 6]
