"""What a dead core leaves of the step it was in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from pageflight.loop.step_trace import LastWords, StepTrace, read_trace

HANDLES = np.arange(100, 110)


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("trace")
    yield made
    os.close(made)


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def handles_in(fd: int) -> tuple[int, ...]:
    words = read_trace(fd)
    assert words is not None
    return words.handles


def test_the_step_under_way_is_told_with_its_sequences(fd: int) -> None:
    trace = StepTrace(fd, epoch=7, num_rows=10)
    assert read_trace(fd) == LastWords(epoch=7, steps=0, handles=())
    trace.begin(HANDLES, rows(3, 0, 9))
    assert read_trace(fd) == LastWords(epoch=7, steps=0, handles=(103, 100, 109))
    trace.end()
    assert read_trace(fd) == LastWords(epoch=7, steps=1, handles=())
    trace.begin(HANDLES, rows(1))
    assert handles_in(fd) == (101,)


def test_a_sequence_that_is_looked_at_is_told_alone_between_steps_and_beside_one_that_runs(fd: int) -> None:
    """A request that cannot even be taken in was put on the step before it; one that came in time for another's
    crash was the only suspect."""
    trace = StepTrace(fd, epoch=7, num_rows=10)
    trace.take(555)
    assert handles_in(fd) == (555,)
    trace.begin(HANDLES, rows(0, 1, 2))
    assert handles_in(fd) == (100, 101, 102, 555)
    trace.taken()
    assert handles_in(fd) == (100, 101, 102)
    trace.end()
    assert handles_in(fd) == ()


def test_a_core_that_died_before_its_trace_began_says_nothing(fd: int) -> None:
    """The supervisor read the words of the core before it."""
    StepTrace(fd, epoch=7, num_rows=10).begin(HANDLES, rows(0))
    os.ftruncate(fd, 0)
    assert read_trace(fd) is None


def test_a_core_without_supervisor_traces_for_nobody() -> None:
    trace = StepTrace(-1, epoch=7, num_rows=4)
    trace.begin(HANDLES, rows(0))
    trace.end()


DYING = """
import os, signal, sys
import numpy as np
from pageflight.loop.step_trace import StepTrace
trace = StepTrace(int(sys.argv[1]), 9, 1024)
handles = np.arange(1024) + 5000
trace.begin(handles, np.arange(1024, dtype=np.int32))
trace.end()
trace.begin(handles, np.arange(10, dtype=np.int32))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_trace_outlives_a_killed_process(fd: int) -> None:
    ended = subprocess.run([sys.executable, "-c", DYING, str(fd)], pass_fds=(fd,), check=False)
    assert ended.returncode == -signal.SIGKILL
    assert read_trace(fd) == LastWords(epoch=9, steps=1, handles=tuple(range(5000, 5010)))
