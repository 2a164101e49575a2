"""Who dials in is a rank with the key, or is turned away, and holds up nobody."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from front_harness import eventually

from pageflight.core.errors import ConfigError, RanksMissing
from pageflight.ranks import dialing, handshake, listener
from pageflight.ranks.dialing import NoLeader, dial, parse_leader
from pageflight.ranks.handshake import RankRefused
from pageflight.ranks.key import rank_key
from pageflight.ranks.listener import RankListener, named
from pageflight.ranks.network import interface_towards

KEY = b"a key of these tests"
HOST = "127.0.0.1"


@pytest.fixture
def two() -> Iterator[RankListener]:
    """Where ranks 2 and 3 are expected."""
    listening = RankListener([2, 3], KEY, host=HOST)
    yield listening
    listening.close()


def leader(listening: RankListener) -> tuple[str, int]:
    return HOST, listening.port


def test_ranks_that_have_the_key_are_taken_and_talked_to(two: RankListener) -> None:
    """Messages of any size pass both ways, and how a rank ends is its line's end."""
    lines = [dial(leader(two), rank, KEY, wait_s=5) for rank in (3, 2)]
    ranks = two.wait(5, lambda missing: None)
    assert [each.rank for each in ranks] == [2, 3] and ranks[1].name == f"rank 3 on {socket.gethostname()}"
    assert {each.host for each in ranks} == {HOST}
    lines[0].send_bytes(b"x" * 1_000_000)
    assert len(ranks[1].line.recv_bytes()) == 1_000_000
    ranks[0].line.send_bytes(b"plan")
    assert lines[1].recv_bytes() == b"plan"
    assert ranks[0].wait(0.0) is None
    lines[1].send_bytes(b"last words")
    lines[1].close()
    assert ranks[0].wait(5).words == "its line ended" and ranks[0].line.recv_bytes() == b"last words"
    ranks[1].hang_up()
    with pytest.raises(EOFError):
        lines[0].recv_bytes()
    assert ranks[1].wait(0.0) is None, "it is told to end, and ends by itself"
    lines[0].close()
    assert ranks[1].wait(5) is not None


def test_strangers_hold_up_nobody(two: RankListener, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port scanner that said nothing kept a model from starting; one that sent a length kept its memory."""
    monkeypatch.setattr(handshake, "LIMIT_S", 0.5)
    silent = [socket.create_connection(leader(two)) for _ in range(5)]
    speaking = [socket.create_connection(leader(two)) for _ in range(3)]
    for stranger, words in zip(
        speaking, (b"GET / HTTP/1.1\r\n\r\n", struct.pack("!i", 1 << 30), b"\0\0\0\4abcd"), strict=True
    ):
        stranger.sendall(words)
    dripping = socket.create_connection(leader(two))
    ended = threading.Event()

    def drip() -> None:
        dripping.sendall(struct.pack("!i", 900))
        while not ended.is_set():
            try:
                dripping.sendall(b"x")
            except OSError:
                return
            time.sleep(0.05)

    thread = threading.Thread(target=drip)
    thread.start()
    lines = [dial(leader(two), rank, KEY, wait_s=5) for rank in (2, 3)]
    assert len(two.wait(5, lambda missing: None)) == 2
    thread.join(10)
    assert not thread.is_alive(), "a byte now and then is no way to stay"
    for stranger in (*silent, *speaking, dripping):
        stranger.settimeout(5)
        try:
            while stranger.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
        stranger.close()
    ended.set()
    for line in lines:
        line.close()


def test_strangers_that_come_back_at_once_keep_no_rank_out(caplog: pytest.LogCaptureFixture) -> None:
    """They had all the places, five seconds each, and took them again: a rank with the key was sent away. Each of them
    was a line in the log."""
    listening = RankListener([1, 2], KEY, host=HOST)
    ended = threading.Event()

    def stay(number: int) -> None:
        while not ended.is_set():
            with suppress(OSError), socket.socket() as stranger:
                stranger.bind((f"127.0.0.{number % 8 + 1}", 0))
                stranger.connect(leader(listening))
                while stranger.recv(1 << 10):
                    pass

    threads = [threading.Thread(target=stay, args=(number,)) for number in range(100)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(listening._strangers) == listener.MOST_STRANGERS, "all places are taken")
    num_before = threading.active_count()
    lines = [dial(leader(listening), rank, KEY, wait_s=30) for rank in (1, 2)]
    assert len(listening.wait(30, lambda missing: None)) == 2
    assert threading.active_count() < num_before + listener.MOST_STRANGERS
    time.sleep(2 * listener.LEAST_STAY_S)
    ended.set()
    listening.close()
    for thread in threads:
        thread.join()
    for line in lines:
        line.close()
    assert 1 <= sum("was not taken" in record.message for record in caplog.records) < 5


def test_a_thread_that_cannot_be_had_costs_one_caller(two: RankListener, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that accepts ended with it, and nobody ever dialled in again."""
    start, num_left = threading.Thread.start, 2

    def failing(thread: threading.Thread) -> None:
        nonlocal num_left
        if thread.name == "rank-stranger" and num_left:
            num_left -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", failing)
    lines = [dial(leader(two), rank, KEY, wait_s=10) for rank in (2, 3)]
    assert len(two.wait(5, lambda missing: None)) == 2 and not num_left and not two._strangers
    for line in lines:
        line.close()


def refusal(listening: RankListener, rank: int) -> str:
    with pytest.raises(RankRefused) as caught:
        dial(leader(listening), rank, KEY, wait_s=5)
    assert caught.value.is_final
    return str(caught.value)


def test_who_cannot_be_taken_is_told_why_and_so_is_the_leader(
    two: RankListener, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with an old key, or the number of another, tried for ever; nobody knew what was missing."""
    with pytest.raises(NoLeader, match=r"for 0\.3 s: the leader has another key"):
        dial(leader(two), 2, b"the key of last week", wait_s=0.3)
    assert refusal(two, 7) == "rank 7 does not dial in: ranks 2-3 of this model do"
    with monkeypatch.context() as patch:
        patch.setattr(dialing, "__version__", "0.0.1")
        assert "rank 2 is of pageflight 0.0.1, the leader of " in refusal(two, 2)
    line = dial(leader(two), 2, KEY, wait_s=5)
    with pytest.raises(NoLeader, match=r"for 0\.3 s: rank 2 on \S+ is here already"):
        dial(leader(two), 2, KEY, wait_s=0.3)
    told: list[list[int]] = []
    with pytest.raises(RanksMissing, match=r"^rank 3 did not dial in to port \d+ within rank_wait_s=0\.1") as caught:
        two.wait(0.1, lambda missing: told.append(list(missing)))
    assert told == [[3]]
    assert f"; {HOST} was not taken: it has another key" in str(caught.value)
    assert f"; {HOST} ({socket.gethostname()}) was not taken: rank 2 on " in str(caught.value), "the last word on each"
    line.close()


def test_a_leader_without_the_key_gets_no_rank_and_ends_none() -> None:
    """Whoever answered at the leader's address was given a process to command, or had it end for good."""
    with socket.create_server((HOST, 0)) as server:
        at = HOST, server.getsockname()[1]

        def pretend() -> None:
            for answer in (handshake.Answer(b"m" * 32), handshake.Answer(b"", "go away", is_final=True)):
                peer, _ = server.accept()
                with peer:
                    handshake._send(peer, handshake.Challenge("pageflight ranks", b"n" * 32))
                    handshake._receive(peer, handshake.Hello, time.monotonic() + 5)
                    handshake._send(peer, answer)

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(NoLeader, match="the leader has another key"):
            dial(at, 1, KEY, wait_s=0.0)
        with pytest.raises(NoLeader, match="the leader has another key"):
            dial(at, 1, KEY, wait_s=0.0)
        thread.join()


def test_a_rank_that_goes_before_all_are_there_must_come_again(two: RankListener) -> None:
    """The spec was sent to a line that had ended, and the start failed."""
    first = dial(leader(two), 2, KEY, wait_s=5)
    told: list[list[int]] = []

    def missing(ranks: list[int]) -> None:
        told.append(list(ranks))
        if told == [[3]]:
            first.close()
        elif told[-1] == [2, 3]:
            lines.extend(dial(leader(two), rank, KEY, wait_s=5) for rank in (2, 3))

    lines: list[object] = []
    assert len(two.wait(5, missing)) == 2
    assert told[:2] == [[3], [2, 3]]


def test_a_rank_that_is_lost_later_is_not_replaced_under_who_has_it(two: RankListener) -> None:
    """It dialled in again before the core had noticed, and the core read the old one's words from a closed line."""
    lines = [dial(leader(two), rank, KEY, wait_s=5) for rank in (2, 3)]
    ranks = two.wait(5, lambda missing: None)
    lines[0].send_bytes(b"last words")
    lines[0].close()
    assert ranks[0].wait(5) is not None
    with pytest.raises(NoLeader, match="is here already"):
        dial(leader(two), 2, KEY, wait_s=0.2)
    assert ranks[0].line.recv_bytes() == b"last words"
    lines[1].close()


def test_a_port_that_is_taken_is_named(two: RankListener) -> None:
    with pytest.raises(ConfigError, match=f"rank_port={two.port}: cannot listen on it: Address already in use"):
        RankListener([1], KEY, host=HOST, port=two.port)


def test_the_key_is_named_where_it_is_missing_short_or_unreadable(tmp_path: Path) -> None:
    """Without one, anybody who reached the port had a machine to command."""
    with pytest.raises(ConfigError, match=r"PAGEFLIGHT_RANK_KEY is not set: .* PAGEFLIGHT_RANK_KEY_FILE names"):
        rank_key({})
    with pytest.raises(ConfigError, match="PAGEFLIGHT_RANK_KEY: the key has 5 characters, at least 16 are needed"):
        rank_key({"PAGEFLIGHT_RANK_KEY": "short"})
    file = tmp_path / "key"
    with pytest.raises(ConfigError, match=f"PAGEFLIGHT_RANK_KEY_FILE={file}: cannot be read"):
        rank_key({"PAGEFLIGHT_RANK_KEY_FILE": str(file)})
    file.write_text("0123456789abcdef\n")
    assert rank_key({"PAGEFLIGHT_RANK_KEY_FILE": str(file)}) == b"0123456789abcdef"


def test_ranks_are_named_in_runs() -> None:
    assert named([3]) == "rank 3" and named([8, 9, 10, 12]) == "ranks 8-10, 12"


def test_leaders_are_hosts_with_or_without_a_port() -> None:
    assert parse_leader("node-a", 29600) == ("node-a", 29600)
    assert parse_leader("10.0.0.1:4000", 29600) == ("10.0.0.1", 4000)
    assert parse_leader("[fd00::1]:4000", 29600) == ("fd00::1", 4000) == parse_leader("fd00::1", 4000)
    for wrong in ("", ":4000", "a:b", "a:0", "a:70000"):
        with pytest.raises(ConfigError, match="leader="):
            parse_leader(wrong, 29600)


def test_the_interface_is_the_one_that_leads_there() -> None:
    """gloo took the first one, which the other machine could not reach."""
    assert interface_towards("127.0.0.1") == interface_towards("127.0.0.2") == "lo"
    with pytest.raises(ConfigError, match="no way to the first rank's host"):
        interface_towards("no-such-host.invalid")
