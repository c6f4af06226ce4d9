# SPDX-License-Identifier: Apache-2.0
"""Attacks on every verifier: none scores, none harms, none delays a batch by more than its timeout."""

import ctypes
import importlib.util
import json
import os
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import verifier_attacks
from verifier_attacks import Attack, Target
from verifier_tools import children

from mlx_realign.verifiers import Pool, names, sandbox

SLACK_S = 1.5  # on top of a timeout: noticing it and ending the worker, on a busy machine
LONGEST_S = 3.0  # instead of up to 10 for a verifier: what hangs does so for ever
SUBREAPER = 36  # prctl: processes whose parent has ended become this one's children, where they can be counted
LEAST = 60  # attacks, over all verifiers

met: dict[str, list[tuple[str, str, float]]] = {}  # verifier -> (attack, reason, seconds)


class Scene(NamedTuple):
    """What an attack could harm."""

    canary: Path
    listener: socket.socket
    datagrams: socket.socket
    before: set[int]

    @property
    def port(self) -> int:
        return self.listener.getsockname()[1]

    def harm(self) -> list[str]:
        """What has changed outside of the workers."""
        found = []
        if self.canary.read_text() != CANARY or self.canary.stat().st_mode & 0o777 != 0o666:
            found.append("the canary was touched")
        found += [f"new file {path.name}" for path in self.canary.parent.iterdir() if path != self.canary]
        for server in (self.listener, self.datagrams):
            try:
                server.recv(1) if server is self.datagrams else server.accept()
                found.append("the network was reached")
            except BlockingIOError:
                pass
        return found


CANARY = json.dumps({"tests": [{"call": f"double({n})", "expected": 2 * n} for n in (3, -1, 50)]})


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A file that anyone may write, two sockets that listen, and this process as the parent of what is left over."""
    folder = tmp_path_factory.mktemp("outside")
    canary = folder / "canary.json"
    canary.write_text(CANARY)
    for path in (canary, folder):
        path.chmod(0o777 if path.is_dir() else 0o666)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    with socket.socket() as listener, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
        listener.bind(("127.0.0.1", 0))
        datagrams.bind(("127.0.0.1", listener.getsockname()[1]))
        listener.listen()
        for server in (listener, datagrams):
            server.setblocking(False)
        yield Scene(canary, listener, datagrams, children())
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SUBREAPER, 0, 0, 0, 0)


def left_behind(before: set[int]) -> set[int]:
    """Children that stay although the pool is closed; those that have ended are buried."""
    end = time.monotonic() + 5
    while (found := children() - before) and time.monotonic() < end:
        for process in found:
            os.waitpid(process, os.WNOHANG)
        time.sleep(0.02)
    return found


def assault(target: Target, canary: Path) -> list[str]:
    """What went wrong: attacks in batches of their own, and between them right answers that must still get their 1."""
    wrong, before = [], "the start"
    with Pool([target.spec], workers=1) as pool:
        pool.verifiers = [own._replace(timeout_s=min(own.timeout_s, LONGEST_S)) for own in pool.verifiers]
        for n, attack in enumerate([*target.attacks, None]):
            if n % target.every == 0 or attack is None:
                right = pool.judge([target.right], [target.row])[0][0]
                wrong += [] if right.score == 1.0 else [f"behind {before}: the right answer got {right}"]
            if attack is None:
                break
            start = time.perf_counter()
            found = pool.judge([attack.completion.replace("CANARY", str(canary))], [attack.row])[0][0]
            seconds = time.perf_counter() - start
            met.setdefault(target.name, []).append((attack.name, found.reason, seconds))
            if (found.score or 0) > attack.most:
                wrong.append(f"{attack.name}: scored {found.score}")
            if seconds > pool.verifiers[0].timeout_s + SLACK_S:
                wrong.append(f"{attack.name}: took {seconds:.1f} s")
            before = attack.name
    return wrong


def targets() -> list[Target]:
    """What can be attacked on this machine; those that take longest first."""
    found = [] if sandbox.isolation() is None else [verifier_attacks.code("CANARY", 0, 0)]
    found += [verifier_attacks.own()] if sys.platform == "linux" else []
    needs = {"math": "math_verify", "json_schema": "jsonschema", "reasoning_gym": "reasoning_gym"}
    plain = [x for x in verifier_attacks.plain_targets() if importlib.util.find_spec(needs.get(x.name, "json"))]
    return [*found, *sorted(plain, key=lambda target: target.name not in needs)]


@pytest.fixture(scope="module")
def ended(scene: Scene) -> dict[str, list[str]]:
    """Verifier -> what went wrong with it, all attacks made: side by side, since much of it is waiting."""
    made = [x for x in targets() if x.name != "code"]
    if len(made) < len(targets()):  # half and half, for a second worker
        programs = verifier_attacks.code(str(scene.canary), scene.port, os.getpid())
        made = [*(programs._replace(attacks=programs.attacks[part::2]) for part in (0, 1)), *made]
    with ThreadPoolExecutor(5) as threads:
        found = list(threads.map(lambda target: assault(target, scene.canary), made))
    return {
        x.name: [text for y, wrong in zip(made, found, strict=True) if y.name == x.name for text in wrong] for x in made
    }


@pytest.mark.parametrize("name", [target.name for target in targets()])
def test_no_attack_scores_or_delays_or_spoils_what_comes_after(name: str, ended: dict[str, list[str]]):
    assert not ended[name], "\n".join(ended[name])


def test_no_attack_leaves_anything_behind(scene: Scene, ended: dict[str, list[str]]):
    assert len(ended) > 7
    assert not scene.harm()
    assert not (left_behind(scene.before) if sys.platform == "linux" else set())


@pytest.mark.skipif(sandbox.isolation() is None, reason="nothing here confines programs")
def test_every_way_of_confining_withstands_the_programs_that_do_harm(scene: Scene, monkeypatch: pytest.MonkeyPatch):
    """In this process, by each route that the machine has beside the one it takes by itself."""
    taken = sandbox.route().name
    everything = verifier_attacks.code(str(scene.canary), scene.port, os.getpid()).attacks
    harmful = [attack for attack in everything if any(word in attack.name for word in HARMFUL)]
    assert len(harmful) > 15
    for name in sandbox.candidates():
        if name == taken:
            continue
        try:
            found = sandbox.Route(name, sandbox._probe(name), "")
        except OSError:
            continue
        monkeypatch.setattr(sandbox, "route", lambda found=found: found)
        assert not [f"{name}: {attack.name}" for attack in harmful if passes(attack)]
        assert not scene.harm()
        assert not (left_behind(scene.before) if sys.platform == "linux" else set())


HARMFUL = "fork, daemon, outside, way out, killed, read from, connection, datagram, traced, limits".split(", ")


def passes(attack: Attack) -> bool:
    from mlx_realign.verifiers import Refused, code

    try:
        return code.verify(attack.completion, attack.row) == 1.0
    except Refused:
        return False


def test_what_hangs_leaves_the_rest_of_its_batch_alone(scene: Scene):
    """Three that hang among 40 right ones, two workers: the delay is the timeouts', and all right ones score."""
    target = verifier_attacks.own()
    texts = ["right"] * 43
    for at, name in ((0, "sleep"), (11, "loop"), (30, "catch every exception")):
        texts[at] = name
    with Pool([target.spec], workers=2) as pool:
        pool.judge(["right"], [target.row])
        start = time.perf_counter()
        found = [verdicts[0] for verdicts in pool.judge(texts, [target.row] * len(texts))]
        seconds = time.perf_counter() - start
    assert Counter(verdict.reason for verdict in found) == {"": 40, "timeout": 3}
    assert all(verdict.score == 1.0 for verdict in found if not verdict.reason)
    assert seconds < 3 * 0.5 + 2.5
    assert not (left_behind(scene.before) if sys.platform == "linux" else set())


def test_every_verifier_is_attacked_and_the_table_says_how_it_ended(ended: dict[str, list[str]]):
    """Prints what each verifier met (pytest -rP shows it)."""
    every = {target.name: len(target.attacks) for target in verifier_attacks.plain_targets()}
    assert set(names()) == {*every, "code"}
    print(f"{'verifier':<16}{'attacks':>8}{'slowest':>9}   verdict 0 because")
    for name, attacks in met.items():
        reasons = Counter(reason or "wrong" for _, reason, _ in attacks)
        slowest = max(seconds for _, _, seconds in attacks)
        told = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        print(f"{name:<16}{len(attacks):>8}{slowest:>7.1f} s   {told}")
    total = sum(map(len, met.values()))
    print(f"{total} attacks, {sum(map(len, ended.values()))} troubles")
    assert total >= LEAST
