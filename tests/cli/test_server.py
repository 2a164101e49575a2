"""The client and the server process, against small fakes of Triton's HTTP side."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from pageflight.backend.ledger import Ledger
from pageflight.cli import console, draining, shared_memory
from pageflight.cli.client import Server
from pageflight.cli.errors import ServerError, ServerStartError
from pageflight.cli.generate import print_answers
from pageflight.cli.serve import running_server
from pageflight.cli.server_flags import ServerFlags
from pageflight.cli.server_process import Ports, ServerProcess
from pageflight.cli.tritonserver import ServerCommand
from pageflight.cli.up import how_to_ask
from pageflight.loop.address import stub_folder


class Handler(BaseHTTPRequestHandler):
    """Answers generate_stream with two deltas; model `broken` fails half way, `refuses` at once."""

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model = self.path.split("/")[3]
        if model == "refuses":
            self.answer(400, b'data: {"error": "temperature=-1: must be at least 0"}\n\n')
        elif model == "gone":
            self.answer(503, b"<html>no JSON</html>")
        else:
            last = {"error": "the engine core died"} if model == "broken" else {"text_output": " ünd"}
            events = [{"text_output": request["text_input"].upper()}, last]
            self.answer(200, b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def server() -> Iterator[Server]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield Server(url=f"http://127.0.0.1:{httpd.server_address[1]}")
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_text_is_printed_as_it_comes(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """Umlauts were printed as escapes."""
    assert print_answers(server.stream("demo", {"text_input": "hello"})) == "HELLO ünd"
    assert capsys.readouterr().out == "HELLO ünd\n"


@pytest.mark.parametrize(
    ("model", "message"),
    [("refuses", "temperature=-1"), ("broken", "engine core died"), ("gone", "status 503")],
)
def test_what_the_server_says_reaches_the_person(server: Server, model: str, message: str) -> None:
    """The client said "Bad Request"; which option was bad stayed between it and the server."""
    with pytest.raises(ServerError, match=message):
        list(server.stream(model, {"text_input": "hello"}))


def free_ports() -> Ports:
    with socket.socket() as a, socket.socket() as b, socket.socket() as c:
        for item in (a, b, c):
            item.bind(("127.0.0.1", 0))
        http, grpc, metrics = (item.getsockname()[1] for item in (a, b, c))
    return Ports(host="127.0.0.1", http=http, grpc=grpc, metrics=metrics)


def test_a_taken_port_is_told_by_its_option() -> None:
    """Triton loaded for a minute and then said "failed to start HTTP service"."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerStartError, match=rf"--grpc-port={port}"):
            Ports(host="127.0.0.1", http=free_ports().http, grpc=port, metrics=free_ports().metrics).check_free()
    with pytest.raises(ServerStartError, match="must differ"):
        Ports(host="127.0.0.1", http=port, grpc=port, metrics=port).check_free()


FAKE = """
import os, signal, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
mode, port, note = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if mode == "fails":
    print("W1120 11:00:00.000000 7 pinned_memory_manager.cc:273] no GPU", flush=True)
    print("E1120 11:00:01.000000 7 model_lifecycle.cc:642] \\"failed to load 'engine' version 1: Internal: "
          "ManifestMismatch: built for another machine; build again\\\\n\\\\nAt:\\\\n  x.py(3)\\"", flush=True)
    print("E1120 11:00:01.000000 7 repo.cc:1] \\"failed to load 'ensemble': depends on 'engine' which is not ready\\"")
    sys.exit(1)
if mode == "lacks a GPU":
    print("E1121 20:07:17.319709 26600 model_lifecycle.cc:642] \\"failed to load 'engine' version 1: Invalid argument: "
          "instance group gpu3 of model engine specifies invalid or unsupported gpu id 3. GPUs with at least the "
          "minimum required CUDA compute compatibility of 6.000000 are: " + note + "\\"", flush=True)
    sys.exit(1)
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *a): pass
server = HTTPServer(("127.0.0.1", port), Handler)
def stop(number, frame):
    open(note, "a").write(signal.Signals(number).name + " ")
    if mode == "drains":
        time.sleep(0.2)
        open(note, "a").write("drained ")
        os._exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
server.serve_forever()
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    path = tmp_path / "fake_tritonserver.py"
    path.write_text(FAKE)
    return path


def start(fake: Path, mode: str, ports: Ports, note: Path | str) -> ServerProcess:
    command = [sys.executable, str(fake), mode, str(ports.http), str(note)]
    return ServerProcess(command, dict(os.environ), ports, verbose=False)


def test_a_failed_start_gives_the_reason_and_not_its_consequences(fake: Path, tmp_path: Path) -> None:
    """Sixty lines of log, the reason in the middle, the last line blaming the ensemble."""
    process = start(fake, "fails", free_ports(), tmp_path / "note")
    with pytest.raises(ServerStartError) as error:
        process.wait_ready(lambda text: None)
    message = str(error.value)
    assert "engine: ManifestMismatch: built for another machine; build again" in message
    assert "ensemble" not in message and "At:" not in message and "pinned" not in message


@pytest.mark.parametrize(("seen", "shown"), [("", "none"), ("0, 1, ", "0, 1")])
def test_a_server_without_the_gpu_of_an_instance_says_so(fake: Path, tmp_path: Path, seen: str, shown: str) -> None:
    """tritonserver 2.51 spoke of compute compatibility, and listed nothing."""
    process = start(fake, "lacks a GPU", free_ports(), seen)
    with pytest.raises(ServerStartError) as error:
        process.wait_ready(lambda text: None)
    assert f"engine: instance gpu3: tritonserver has no GPU 3 (it sees {shown}); look at nvidia-smi" in str(error.value)


def test_a_crash_of_the_server_itself_is_tried_again(
    fake: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Triton's Python backend aborts now and then while it starts; the same command works a second later."""
    ports, note = free_ports(), tmp_path / "note"
    script = tmp_path / "once.sh"
    script.write_text(
        f"[ -e {tmp_path}/tried ] || {{ touch {tmp_path}/tried; echo lock_exception; kill -ABRT $$; }}\n"
        f"exec {sys.executable} {fake} drains {ports.http} {note}\n"
    )
    command = ServerCommand(arguments=("bash", str(script)), environment=dict(os.environ), added_environment={})
    flags = ServerFlags(host=ports.host, http_port=ports.http, grpc_port=ports.grpc, metrics_port=ports.metrics)
    with running_server(command, flags):
        pass
    assert "lock_exception" in capsys.readouterr().err
    assert note.read_text() == "SIGTERM drained "


def test_the_server_is_drained_not_killed(fake: Path, tmp_path: Path) -> None:
    """Ctrl-C cut every open stream in the middle of a word."""
    note = tmp_path / "note"
    process = start(fake, "drains", free_ports(), note)
    process.wait_ready(lambda text: None)
    told: list[str] = []
    assert process.drain(5, told.append) == 0
    assert note.read_text() == "SIGTERM drained " and "draining" in told[0]


def test_a_server_that_takes_its_time_gets_the_rest_of_it(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten seconds after SIGTERM it was killed, whatever --exit-timeout-secs said."""
    process = start(fake, "drains", free_ports(), tmp_path / "note")
    process.wait_ready(lambda text: None)
    monkeypatch.setattr("pageflight.cli.server_process._UNLOAD_S", 0.01)
    assert process.drain(30, lambda text: None) == 0
    assert process.num_cut_off == 0


def test_a_server_is_drained_until_its_stubs_have_nothing_open(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gauge that is published now and then was asked: what had just begun was not on it, and where nobody told the
    server counted as idle."""
    process, note = start(fake, "drains", free_ports(), tmp_path / "note"), tmp_path / "note"
    process.wait_ready(lambda text: None)
    answers: list[int | None] = [3, None, 1, 0]
    seen: list[str] = []

    def num_open(server_pid: int) -> int | None:
        seen.append("ended" if note.exists() else "open")
        return answers.pop(0)

    monkeypatch.setattr(draining, "num_open", num_open)
    assert process.drain(60, lambda text: None, before_end=lambda: seen.append("before end")) == 0
    assert seen == ["open"] * 4 + ["before end"] and answers == []


def test_what_was_cut_off_is_counted(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` ended with status 0 whatever it had cut off."""
    process = start(fake, "hangs", free_ports(), tmp_path / "note")
    process.wait_ready(lambda text: None)
    monkeypatch.setattr("pageflight.cli.server_process._UNLOAD_S", 0.1)
    monkeypatch.setattr(draining, "num_open", lambda server_pid: 2)
    told: list[str] = []
    assert process.drain(0.2, told.append) == -signal.SIGKILL
    assert process.num_cut_off == 2 and told[-1] == "stopping at once: 2 open requests are cut off"


def test_serve_ends_with_status_1_when_it_cut_requests_off(
    fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = free_ports()
    arguments = (sys.executable, str(fake), "hangs", str(ports.http), str(tmp_path / "note"))
    command = ServerCommand(arguments=arguments, environment=dict(os.environ), added_environment={})
    flags = ServerFlags(host=ports.host, http_port=ports.http, grpc_port=ports.grpc, metrics_port=ports.metrics)
    monkeypatch.setattr(draining, "num_open", lambda server_pid: 2)
    monkeypatch.setattr(draining, "wait_until_idle", interrupted)
    with pytest.raises(typer.Exit) as ended, running_server(command, flags):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 1


@pytest.mark.parametrize("failure", [BrokenPipeError(), SystemExit(1)])
def test_a_terminal_that_has_gone_ends_no_server(failure: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first word about draining raised, and every stream was cut off."""

    def fail(*arguments: object, **options: object) -> None:
        raise failure

    monkeypatch.setattr(console.console, "print", fail)
    console.tell("draining")


def interrupted(server_pid: int, timeout_s: float, has_ended: object) -> None:
    """A second Ctrl-C while the server drains."""
    raise KeyboardInterrupt


@pytest.fixture
def own_ledger() -> Iterator[Ledger]:
    """This process as a server with one stub, itself."""
    settings: Any = SimpleNamespace(name="demo", instance=0, server_pid=os.getpid())
    ledger = Ledger(settings, "front")
    yield ledger
    ledger.close()
    shutil.rmtree(stub_folder(os.getpid()), ignore_errors=True)


def test_open_requests_are_counted_by_their_stubs(own_ledger: Ledger) -> None:
    assert draining.num_open(os.getpid()) == 0
    slot = own_ledger.enter((16, 32))
    assert draining.num_open(os.getpid()) == 1
    own_ledger.enter(None)
    assert draining.num_open(os.getpid()) == 2
    own_ledger.leave(slot)
    own_ledger.leave(None)
    assert draining.num_open(os.getpid()) == 0


def test_unknown_is_not_idle(own_ledger: Ledger) -> None:
    """Nobody told how much was open, which counted as nothing."""
    stranger = stub_folder(os.getpid()) / "1"
    stranger.write_bytes(b"of another version")
    assert draining.num_open(os.getpid()) is None
    stranger.unlink()
    assert draining.num_open(os.getpid()) == 0
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
        own_ledger.close()
        assert draining.num_open(os.getpid()) is None
        child.communicate()
    assert draining.num_open(2**22 + 1) == 0, "a server without stubs"


def test_a_server_that_does_not_end_is_ended(fake: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hanging server kept its port until the machine was restarted."""
    process = start(fake, "hangs", free_ports(), tmp_path / "note")
    process.wait_ready(lambda text: None)
    monkeypatch.setattr("pageflight.cli.server_process._UNLOAD_S", 0.5)
    assert process.drain(0.5, lambda text: None) == -signal.SIGKILL


def test_a_server_is_not_waited_for_without_hope(fake: Path, tmp_path: Path) -> None:
    """A model that could not be unloaded held the server for as long as open requests would have had."""
    process = start(fake, "hangs", free_ports(), tmp_path / "note")
    process.wait_ready(lambda text: None)
    assert process.drain(1e6, lambda text: None, is_hopeless=lambda: True) == -signal.SIGKILL


def test_shared_memory_of_a_killed_server_is_removed_and_nobody_else_s(tmp_path: Path) -> None:
    """Each server that was killed left one segment for every process in /dev/shm, until the machine was restarted."""
    ours, others = "triton_python_backend_shm_region_1f-2a", "triton_python_backend_shm_region_3b-4c"
    for name in (ours, others, "something"):
        (tmp_path / name).touch()
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "maps").write_text(
        f"7f00-7f01 rw-s 00000000 00:1b 86   /dev/shm/{ours}\n7f02-7f03 rw-s 00000000 00:1b 87   /dev/shm/something\n"
    )
    found = shared_memory.segments_of(7, proc=tmp_path)
    assert found == {ours} and shared_memory.segments_of(8, proc=tmp_path) == frozenset()
    shared_memory.remove(found, folder=tmp_path)
    shared_memory.remove(found, folder=tmp_path)
    assert not (tmp_path / ours).exists() and (tmp_path / others).exists() and (tmp_path / "something").exists()


def test_the_server_does_not_outlive_its_starter(fake: Path, tmp_path: Path) -> None:
    """kill -9 of the command left tritonserver running, with the port and the memory."""
    ports, note = free_ports(), tmp_path / "note"
    code = (
        "import os, sys; from pathlib import Path; from pageflight.cli.server_process import Ports, ServerProcess;"
        f"p = ServerProcess([sys.executable, {str(fake)!r}, 'drains', '{ports.http}', {str(note)!r}], dict(os.environ),"
        f" Ports(host='127.0.0.1', http={ports.http}), verbose=False); p.wait_ready(lambda t: None);"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    for _ in range(200):
        if note.is_file() and "drained" in note.read_text():
            return
        time.sleep(0.05)
    pytest.fail("the server is still there")


def test_the_printed_python_line_works(server: Server) -> None:
    """The example of the first minute had a quote too many."""
    port = server.address[1]
    lines = how_to_ask(ServerFlags(host="127.0.0.1", http_port=port), "demo", "it's\n").splitlines()
    commands = [line.strip() for line in lines if line.startswith("  ")]
    assert [command.split()[0] for command in commands][:2] == ["curl", "python3"] and len(commands) == 3
    shown = subprocess.run(["bash", "-c", commands[0]], capture_output=True, text=True, check=True).stdout
    assert "IT'S" in shown
    subprocess.run(["bash", "-nc", "\n".join(commands)], check=True)
