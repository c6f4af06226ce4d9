# SPDX-License-Identifier: Apache-2.0
"""What a Mac wants while it trains: memory left to the system, time for long buffers, staying awake."""

import os
import subprocess
import sys

import mlx.core as mx

SHARE = 0.85  # of the size the device recommends; all of it, wired, has ended in kernel panics (mlx#3186)
WATCHDOG = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"


def limit_memory(memory_gb: float | None, wired_gb: float | None) -> None:
    """Set MLX's limits: memory, by default a share of what a GPU recommends, and what of it is kept wired.

    memory_gb, wired_gb: the user's own, GB. Wired is at most the recommended size and the memory limit.
    """
    recommended = mx.device_info().get("max_recommended_working_set_size")
    memory = int(memory_gb * 1e9) if memory_gb else int(SHARE * int(recommended)) if recommended else None
    if memory:
        mx.set_memory_limit(memory)
    if recommended:
        wired = int(wired_gb * 1e9) if wired_gb else memory or 0
        mx.set_wired_limit(min(wired, memory or wired, int(recommended)))
    if memory_gb:
        mx.set_cache_limit(int(memory_gb * 1e9 / 8))


def hints() -> list[str]:
    """What to know before a long run on this machine; nothing where it is no Mac."""
    if sys.platform != "darwin":
        return []
    told = []
    if not os.environ.get(WATCHDOG):
        told.append(f"macOS ends long GPU work while a display is on: {WATCHDOG}=1 before the command gives it time")
    return [*told, *power(_asked("-g", "batt"), _asked("-g"))]


def power(battery: str, settings: str) -> list[str]:
    """What slows or ends a run by what `pmset -g batt` and `pmset -g` say; "" where they say nothing."""
    told = []
    if "'Battery Power'" in battery:
        told.append("this Mac runs on its battery: plug it in, or it slows down and may sleep")
    values: dict[str, str] = dict(line.split()[:2] for line in settings.splitlines() if len(line.split()) >= 2)
    if values.get("lowpowermode") == "1" or values.get("powermode") == "1":
        told.append("low power mode is on: training takes longer by half and more; System Settings, Battery")
    if values.get("sleep") != "0" and "sleep prevented" not in settings:  # unknown, too: nobody loses by caffeinate
        told.append("this Mac may sleep while it trains: `caffeinate -i mlx-realign train ...` keeps it awake")
    return told


def _asked(*words: str) -> str:
    try:
        return subprocess.run(["pmset", *words], capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
