"""Several replicas of a checkpoint change together or not at all. Real engines and models, side by side in one loop."""

import asyncio
import contextlib
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.errors import CheckpointError
from service.channel import Channel
from service.checkpoints import Checkpoint, Checkpoints
from service.engine import Engine
from service.metrics import Metrics
from service.supervisor import RemoteReplica
from service.versions import Versions, model_bytes, version_of
from tests.service.conftest import make_settings


class Fleet:
    """Replicas as they are in as many worker processes, and what decides for them."""

    def __init__(self, checkpoint: Path, **values: object) -> None:
        self.checkpoint = checkpoint
        self.results: list[str] = []
        self.control = Checkpoints(make_settings(checkpoint=checkpoint, **values), self.results.append)
        self.engines: list[Engine] = []

    async def load(self, **values: object) -> tuple[Versions, Checkpoint]:
        """One more replica that has loaded its first version."""
        settings = make_settings(checkpoint=self.checkpoint, **values)
        engine = Engine(settings, Metrics())
        self.engines.append(engine)
        versions = Versions(engine, settings)
        return versions, await versions.start(None, await self.control.first_folder())

    async def start(self, **values: object) -> None:
        """One more replica, which has joined."""
        await self.control.join(*await self.load(**values))

    def active(self) -> list[str]:
        return [engine.active.model.name if engine.active else "" for engine in self.engines]


@contextlib.asynccontextmanager
async def fleet(checkpoint: Path, **values: object) -> AsyncIterator[Fleet]:
    made = Fleet(checkpoint, **values)
    try:
        yield made
    finally:
        for engine in made.engines:
            await engine.stop()


@pytest.fixture
def folder(root: Path, tmp_path: Path) -> Path:
    """Copies of both checkpoints that a test may spoil."""
    for name in ("first", "second"):
        shutil.copytree(root / name, tmp_path / name)
    return tmp_path


def test_what_one_replica_refuses_changes_none(folder: Path) -> None:
    async def scenario() -> None:
        async with fleet(folder / "first") as replicas:
            await replicas.start()
            active = replicas.engines[0].active
            assert active is not None
            await replicas.start(max_model_bytes=model_bytes(active.model))
            first = version_of(folder / "first")
            with pytest.raises(CheckpointError, match="MiB"):
                await replicas.control.activate("second")
            assert replicas.active() == [first, first]
            assert replicas.results == ["refused"]
            # The one that had loaded it has let go of it.
            assert b"second@" not in replicas.engines[0].metrics.render()
            assert (await replicas.control.state()).kept == ()

    asyncio.run(scenario())


def test_one_that_starts_later_serves_what_the_others_serve(folder: Path) -> None:
    async def scenario() -> None:
        async with fleet(folder / "first") as replicas:
            await replicas.start()
            second = await replicas.control.activate("second")
            await replicas.start()
            assert replicas.active() == [second, second]
            # It has never seen the first one, and loads it now.
            first = await replicas.control.roll_back()
            assert replicas.active() == [first, first]
            assert (await replicas.control.state()).kept == (second,)

    asyncio.run(scenario())


def test_one_that_starts_during_a_change_takes_part_in_it(folder: Path) -> None:
    async def scenario() -> None:
        async with fleet(folder / "first") as replicas:
            await replicas.start()
            late = await replicas.load()
            changing = asyncio.create_task(replicas.control.activate("second"))
            await asyncio.sleep(0)
            joining = asyncio.create_task(replicas.control.join(*late))
            second = await changing
            assert replicas.active() == [second, ""]  # the one that joins serves nobody until it has the new version
            await joining
            assert replicas.active() == [second, second]
            with pytest.raises(CheckpointError, match="under way"):
                await asyncio.gather(*(replicas.control.activate("first") for _ in range(2)))

    asyncio.run(scenario())


def test_a_folder_that_was_replaced_is_not_rolled_back_to_by_half(folder: Path) -> None:
    async def scenario() -> None:
        async with fleet(folder / "first") as replicas:
            await replicas.start()
            second = await replicas.control.activate("second")
            shutil.rmtree(folder / "first")
            shutil.copytree(folder / "second", folder / "first")
            await replicas.start()  # has only the folder, the other one still has the version
            with pytest.raises(CheckpointError, match="has changed on disk"):
                await replicas.control.roll_back()
            assert replicas.active() == [second, second]

    asyncio.run(scenario())


def test_one_whose_process_is_gone_stops_a_change_before_any_switch(folder: Path) -> None:
    async def scenario() -> None:
        async with fleet(folder / "first") as replicas:
            await replicas.start()
            ours, theirs = socket.socketpair()
            channel = await Channel.open(ours, {})
            replicas.control.replicas.append(RemoteReplica(channel))
            running = asyncio.create_task(channel.run())
            changing = asyncio.create_task(replicas.control.activate("second"))
            await asyncio.sleep(0.05)
            theirs.close()
            with pytest.raises(CheckpointError, match=r"ended meanwhile|is gone"):
                await changing
            await running
            assert replicas.active() == [version_of(folder / "first")]

    asyncio.run(scenario())


def point(link: Path, target: Path) -> None:
    """Have the link lead elsewhere, in one step."""
    link.with_name("next").symlink_to(target)
    link.with_name("next").rename(link)


def test_the_watcher_follows_a_link_that_moves_and_nothing_else(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    link, first, second = folder / "current", folder / "first", folder / "second"
    point(link, first)

    async def scenario() -> None:
        async with fleet(link, watch_seconds=0.01) as made:
            await made.start()
            watching = asyncio.create_task(made.control.watch())
            await made.control.activate("second")
            await asyncio.sleep(0.1)
            assert made.active() == [version_of(second)]  # what an administrator chose stays: the link did not move
            loading = asyncio.create_task(made.control.activate("first"))
            await asyncio.sleep(0)
            point(link, second)  # during another change
            await made.control.follow_link()
            await loading
            assert made.active() == [version_of(first)]
            async with asyncio.timeout(20):
                while made.active() != [version_of(second)]:
                    await asyncio.sleep(0.01)
            watching.cancel()

    asyncio.run(scenario())
    assert [record.message for record in caplog.records if "link" in record.message] == [
        "the link is not followed: a checkpoint is being loaded; ask again when it is done"
    ]


def test_calls_cross_a_channel_in_both_directions() -> None:
    async def scenario() -> None:
        ours, theirs = socket.socketpair()

        async def double(number: int) -> int:
            if number < 0:
                raise CheckpointError("number: must not be negative" + ", nor so small" * -number)
            return 2 * number

        async def fail() -> None:
            raise OSError("/some/path")

        here = await Channel.open(ours, {"double": double})
        there = await Channel.open(theirs, {"fail": fail})
        tasks = [asyncio.create_task(end.run()) for end in (here, there)]
        assert await asyncio.gather(*(there.call("double", number=n) for n in range(50))) == list(range(0, 100, 2))
        for number in (-1, -100_000):  # however long the refusal is
            with pytest.raises(CheckpointError, match=r"must not be negative(, nor so small)+$"):
                await there.call("double", number=number)
        with pytest.raises(CheckpointError, match=r"^fail failed \(OSError\)$"):  # its text stays where it happened
            await here.call("fail")
        there.close()
        await asyncio.gather(*tasks)
        with pytest.raises(CheckpointError, match="gone"):
            await here.call("fail")

    asyncio.run(scenario())


def test_a_checkpoint_without_replicas_is_refused(folder: Path) -> None:
    control = Checkpoints(make_settings(checkpoint=folder / "first"), lambda _: None)
    with pytest.raises(CheckpointError, match="no worker"):
        asyncio.run(control.activate("second"))
    assert asyncio.run(control.first_folder()) == folder / "first"
