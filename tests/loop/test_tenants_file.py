"""The tenants file while a core runs: read again when it changes, the last good one kept."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest
from front_harness import CONFIG, Collector, NumberText, Recorder, eventually, generation, run

from pageflight.core.errors import ConfigError, QueueFull
from pageflight.core.tenants import Tenants, TenantShare
from pageflight.loop.address import private_address
from pageflight.loop.core_process import CoreSpec, FakeEngine
from pageflight.loop.front import Front
from pageflight.loop.local import make_supervisor, start_core
from pageflight.loop.status import read_status
from pageflight.loop.tenants_file import TenantsFile

FULL = '{"default": {"max_waiting": 0, "max_running": 1}}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tenants.json"
    path.write_text('{"tenants": {"a": {"weight": 2}}}')
    return path


def test_a_change_is_seen_within_a_second_and_told_once(path: Path, tmp_path: Path) -> None:
    file = TenantsFile(path, tmp_path / "kept")
    assert file.load().share_of("a").weight == 2
    assert file.poll(10.0) is None
    path.write_text('{"tenants": {"a": {"weight": 3.5}}}')
    assert file.poll(10.9) is None, "looked at more than once a second"
    assert file.poll(11.0) == Tenants(by_name={"a": TenantShare(weight=3.5)})
    assert file.poll(12.0) is None


@pytest.mark.parametrize("broken", ["", '{"default": {"wieght": 1}}', "\xff"])
def test_a_broken_file_keeps_the_last_good_one_and_is_logged_once(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    """A file that was being written when it was read took everyone's quotas away."""
    file = TenantsFile(path, tmp_path / "kept")
    good = file.load()
    path.write_bytes(broken.encode("latin-1"))
    with caplog.at_level(logging.ERROR):
        for second in range(5):
            assert file.poll(float(second + 1)) is None
    (record,) = caplog.records
    assert str(path) in record.getMessage() and "last good one stays" in record.getMessage()
    assert TenantsFile(path, tmp_path / "kept").load() == good, "the next core forgot it"
    path.write_text("{}")
    assert file.poll(20.0) == Tenants()


def test_a_file_that_is_gone_keeps_the_last_good_one(path: Path, tmp_path: Path) -> None:
    file = TenantsFile(path, tmp_path / "kept")
    file.load()
    path.unlink()
    assert file.poll(1.0) is None and file.poll(2.0) is None
    path.write_text("{}")
    assert file.poll(3.0) == Tenants()


def test_a_full_disk_takes_nobody_the_new_shares(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The core died because it could not write down for the next one what it had read."""
    file = TenantsFile(path, tmp_path / "nowhere" / "kept")
    with caplog.at_level(logging.WARNING, "pageflight.loop.tenants_file"):
        assert file.load().share_of("a").weight == 2
    path.write_text('{"tenants": {"a": {"weight": 3.5}}}')
    assert file.poll(1.0) == Tenants(by_name={"a": TenantShare(weight=3.5)})
    assert "may begin with older shares" in caplog.text


def test_a_core_does_not_start_with_a_file_that_was_never_good(path: Path) -> None:
    path.write_text('{"default": {"weight": 0}}')
    spec = CoreSpec(config=CONFIG, fake=FakeEngine(), tenants_file=str(path))
    with (
        pytest.raises(ConfigError, match=r"tenants=.*tenants\.json: default\.weight=0"),
        start_core(spec, NumberText()),
    ):
        pass


def test_a_running_core_and_the_one_after_it_follow_the_file(path: Path) -> None:
    """Quotas that are changed count without a restart; and a restart does not bring the old ones back."""
    spec = CoreSpec(config=CONFIG, fake=FakeEngine(step_s=0.002), tenants_file=str(path))
    address = private_address()
    supervisor = make_supervisor(spec, address)
    supervisor.start()
    try:
        supervisor.wait_ready(60)
        front = Front(address, NumberText(), Recorder())
        front.wait_ready(60)
        assert not _refuses(front)
        path.write_text(FULL)
        eventually(lambda: _refuses(front), "the quota of the changed file counts")
        path.write_text("broken")
        status = read_status(address.status)
        assert status is not None
        os.kill(status.core_pid, signal.SIGKILL)
        run(front, generation())
        assert _refuses(front), "the next core has no quota"
        front.close(0)
    finally:
        supervisor.close(5)


def _refuses(front: Front) -> bool:
    """Whether the second of two requests at once is refused for its tenant's quota."""
    sinks = [Collector(), Collector()]
    for sink in sinks:
        front.submit(generation(max_tokens=40, tenant="x"), sink)
    finals = [sink.wait().finals[0] for sink in sinks]
    assert finals[0].error is None
    error = finals[1].error
    if error is None:
        return False
    assert isinstance(error, QueueFull) and "queue of tenant 'x' is full" in str(error)
    return True
