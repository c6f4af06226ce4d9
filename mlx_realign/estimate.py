# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a run before it starts, by computing one real micro-batch of it."""

import time
from typing import Any

import mlx.core as mx
import numpy as np

from .policy import Policy


def estimate(policy: Policy, loop: Any) -> dict[str, Any]:
    """peak_memory_gb from the widest micro-batch of the first epoch, seconds from its time per token."""
    plan = loop.plan(0)
    sizes = [int(loop.rows.sizes[rows].sum()) for rows in plan]
    widest = int(np.argmax(sizes))
    window = loop.collate([loop.rows[int(i)] for i in plan[widest]])
    mx.reset_peak_memory()
    started = time.perf_counter()
    policy.gradients(window.batch, loop.loss)
    per_token = (time.perf_counter() - started) / sizes[widest]
    optimizer_gb = 2 * 4 * policy.trained / 1e9  # two float32 moments per trained parameter
    seconds = per_token * float(np.mean(sizes)) * loop.micro
    return {
        "estimated_peak_memory_gb": round(mx.get_peak_memory() / 1e9 + optimizer_gb, 3),
        "estimated_time_s": round(seconds, 1),
    }
