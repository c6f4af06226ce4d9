# SPDX-License-Identifier: Apache-2.0
"""What a Mac is asked and told: limits from the size its GPU recommends, power settings that slow a run."""

import mlx.core as mx
import pytest

from mlx_realign import manners

GB = 10**9
ON_MAINS = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=4522083)	100%; charged; 0:00 remaining present: true"""
SETTINGS = """System-wide power settings:
Currently in use:
 standby              1
 sleep                {sleep}
 lowpowermode         {low}
 displaysleep         10"""


@pytest.mark.parametrize(
    ("recommended", "memory", "wired", "expected"),
    [
        (48 * GB, None, None, {"memory": 40.8, "wired": 40.8}),
        (48 * GB, 20.0, None, {"memory": 20, "wired": 20, "cache": 2.5}),
        (48 * GB, 60.0, None, {"memory": 60, "wired": 48, "cache": 7.5}),
        (48 * GB, None, 10.0, {"memory": 40.8, "wired": 10}),
        (48 * GB, 20.0, 30.0, {"memory": 20, "wired": 20, "cache": 2.5}),
        (None, None, None, {}),
        (None, 8.0, None, {"memory": 8, "cache": 1}),
    ],
)
def test_limits_leave_the_system_its_share(monkeypatch, recommended, memory, wired, expected):
    seen: dict[str, float] = {}
    device = {"max_recommended_working_set_size": recommended} if recommended else {}
    monkeypatch.setattr(mx, "device_info", lambda: device)
    for name in ("memory", "wired", "cache"):
        monkeypatch.setattr(mx, f"set_{name}_limit", lambda size, name=name: seen.__setitem__(name, size / GB))
    manners.limit_memory(memory, wired)
    assert seen == pytest.approx(expected)


def test_what_slows_a_run_is_told():
    assert manners.power(ON_MAINS, SETTINGS.format(sleep=0, low=0)) == []
    told = manners.power(ON_MAINS.replace("AC Power", "Battery Power"), SETTINGS.format(sleep=1, low=1))
    assert [word in line for word, line in zip(("battery", "low power", "caffeinate"), told, strict=True)] == [True] * 3
    awake = SETTINGS.format(sleep="1 (sleep prevented by caffeinate)", low=0)
    assert manners.power(ON_MAINS, awake) == []
    (told,) = manners.power("", "")  # pmset could not be asked
    assert "`caffeinate -i mlx-realign train" in told


def test_a_mac_is_told_and_others_are_not(monkeypatch):
    said = {"batt": ON_MAINS, "-g": SETTINGS.format(sleep=0, low=0)}
    monkeypatch.setattr(manners, "_asked", lambda *words: said[words[-1]])
    monkeypatch.setattr(manners.sys, "platform", "darwin")
    monkeypatch.delenv(manners.WATCHDOG, raising=False)
    (told,) = manners.hints()
    assert told.endswith("AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 before the command gives it time")
    monkeypatch.setenv(manners.WATCHDOG, "1")
    assert manners.hints() == []
    said["-g"] = SETTINGS.format(sleep=1, low=0)
    assert ["caffeinate" in line for line in manners.hints()] == [True]
    monkeypatch.setattr(manners.sys, "platform", "linux")
    assert manners.hints() == []
