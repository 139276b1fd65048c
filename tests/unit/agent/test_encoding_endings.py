"""How an encoding ends: stopped, late, failed at the last moment, stored."""

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from everstep.agent import actions, contributions, encoding, events

from .encoding_group import (
    DEADLINE_S,
    FOUR,
    UNIT,
    Group,
    eventually,
    nothing_is_published,
    one_each,
    parity_of,
    run,
)
from .small_nodes import JOB, LAYOUT, LAYOUT_ID, STALL_TIMEOUT_S


def held_at_unit(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    reached, go = threading.Event(), threading.Event()

    def failpoint(name: str) -> None:
        if name == "agent.encode.unit":
            reached.set()
            assert go.wait(DEADLINE_S)

    monkeypatch.setattr(contributions, "failpoint", failpoint)
    return reached, go


def test_what_is_stopped_leaves_nothing_behind_and_is_not_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go = held_at_unit(monkeypatch)

    async def body(group: Group) -> None:
        group.encode("n1")
        await eventually(reached.is_set, "it never encodes")
        job = group.nodes["n1"].state.jobs[JOB]
        ended = events.RoundEnded(JOB, group.plan.plan_id, commit=False, reason="on purpose")
        group.nodes["n1"].pipeline.submit(ended)
        assert not job.rounds
        go.set()
        made = group.encodings["n1"]
        await eventually(lambda: made.counters["stopped"], "it goes on")
        assert await group.nodes["n1"].pipeline.idle(DEADLINE_S)
        assert group.answers["n1"] == []
        # The one that was held adds no other unit; the other two may have been through.
        assert made.counters["bytes_received"] <= (1 + 2 * 9) * UNIT
        await nothing_is_published(group, "n1")

    run(tmp_path, one_each(UNIT, 27 * UNIT, 27 * UNIT, 27 * UNIT), 1, body)


def test_what_is_stopped_while_it_asks_ends_at_once(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        asked = asyncio.Event()

        async def describe(node_id: str, request: Any) -> Any:
            asked.set()
            await asyncio.Event().wait()

        group.calls["n1"].handlers["Describe"] = describe
        group.encode("n1")
        await asked.wait()
        begun_s = time.monotonic()
        group.perform("n1", actions.StopEncoding(JOB, group.plan.plan_id))
        made = group.encodings["n1"]
        await eventually(lambda: made.counters["stopped"], "it goes on")
        assert time.monotonic() - begun_s < STALL_TIMEOUT_S / 2
        assert group.answers["n1"] == []

    run(tmp_path, FOUR, 1, body)


def test_what_is_stopped_before_it_began(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        async def describe(node_id: str, request: Any) -> Any:
            raise AssertionError("nobody need be asked")

        group.calls["n1"].handlers["Describe"] = describe
        group.encode("n1")
        group.perform("n1", actions.StopEncoding(JOB, group.plan.plan_id))
        group.perform("n1", actions.DeleteParity(JOB, group.plan.plan_id))
        assert await group.nodes["n1"].pipeline.idle(DEADLINE_S)
        assert group.answers["n1"] == []
        assert group.encodings["n1"].counters["stopped"] == 1
        await nothing_is_published(group, "n1")

    run(tmp_path, FOUR, 1, body)


def test_parity_is_deleted_only_after_its_encoding_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about_to, go = threading.Event(), threading.Event()

    def failpoint(name: str) -> None:
        if name == "agent.encode.before_publish":
            about_to.set()
            assert go.wait(DEADLINE_S)

    monkeypatch.setattr(encoding, "failpoint", failpoint)

    async def body(group: Group) -> None:
        group.encode("n1")
        await eventually(about_to.is_set, "it never publishes")
        group.perform("n1", actions.StopEncoding(JOB, group.plan.plan_id))
        group.perform("n1", actions.DeleteParity(JOB, group.plan.plan_id))
        workers = group.nodes["n1"].pipeline.workers
        for _ in range(20):  # so that it could have been deleted by now
            await asyncio.get_running_loop().run_in_executor(workers, os.sched_yield)
        go.set()
        assert await group.nodes["n1"].pipeline.idle(DEADLINE_S)
        assert group.published("n1") is None

    run(tmp_path, FOUR, 1, body)


def test_nothing_is_published_if_it_fails_right_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failpoint(name: str) -> None:
        if name == "agent.encode.before_publish":
            raise OSError(5, "on purpose")

    monkeypatch.setattr(encoding, "failpoint", failpoint)

    async def body(group: Group) -> None:
        group.encode("n1")
        assert "on purpose" in await group.answer("n1")
        await nothing_is_published(group, "n1")

    run(tmp_path, FOUR, 1, body)


def test_a_round_ends_by_its_deadline(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        begun_s = time.monotonic()
        group.encode("n1")
        problem = await group.answer("n1")
        assert problem.startswith("n")
        assert time.monotonic() - begun_s < 1.0 + 2 * STALL_TIMEOUT_S
        await nothing_is_published(group, "n1")

    overrides: dict[str, Any] = {"parity__timeout_s": 1.0, "parity__rate_bytes_s": 1 << 20}
    run(tmp_path, one_each(UNIT, 9 * UNIT, 9 * UNIT), 1, body, **overrides)


def test_parity_goes_to_nvme_with_the_layouts(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        group.encode("n1")
        assert await group.answer("n1") == ""
        node = group.nodes["n1"]
        group.perform("n1", actions.FlushParity(group.plan))
        assert await node.pipeline.idle(DEADLINE_S)
        assert group.encodings["n1"].counters["stored"] == 1
        assert node.nvme.parity.verify(JOB, group.plan.plan_id) == []
        with node.nvme.parity.open(JOB, group.plan.plan_id) as stored:
            assert bytes(stored.image) == parity_of(group.plan, 0, group.shards)
            published = group.published("n1")
            assert published is not None
            assert stored.manifest == published[1]
        assert node.nvme.layout(JOB, LAYOUT_ID) == LAYOUT

    run(tmp_path, FOUR, 1, body)


def test_parity_that_cannot_be_stored_is_counted(tmp_path: Path) -> None:
    async def body(group: Group) -> None:
        group.encode("n1")
        assert await group.answer("n1") == ""
        node = group.nodes["n1"]
        with node.parity.open(JOB, group.plan.plan_id) as image, image.path.open("r+b") as file:
            file.write(b"rotten")
        group.perform("n1", actions.FlushParity(group.plan))
        assert await node.pipeline.idle(DEADLINE_S)
        assert group.encodings["n1"].counters["store_failed"] == 1
        assert node.nvme.parity.manifests(JOB) == []

    run(tmp_path, FOUR, 1, body)


def test_the_same_plan_is_not_encoded_twice_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go = held_at_unit(monkeypatch)

    async def body(group: Group) -> None:
        group.encode("n1")
        await eventually(reached.is_set, "it never encodes")
        assert "already" in await group.encodings["n1"].make(group.plan)
        go.set()
        assert await group.answer("n1") == ""
        assert await group.encodings["n1"].make(group.plan) == ""

    run(tmp_path, FOUR, 1, body)
