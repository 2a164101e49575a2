"""A real server with what the manifests allow, and its probes: no root, no capabilities, a read-only root, volumes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
from manifest_rules import WRITABLE
from manifests import ROOT

from pageflight_build.options import BuildOptions, EngineOptions, ServingOptions
from pageflight_build.recipe import build

UID = "10001"
CONFINE = [
    *("unshare", "--user", f"--map-user={UID}", f"--map-group={UID}", "--keep-caps", "--mount", "--pid", "--fork"),
    "--kill-child",
    str(Path(__file__).with_name("confine.sh")),
]
INSIDE = """
import json, os, signal, subprocess, sys, time
from pathlib import Path

program, script, http, grpc, metrics = sys.argv[1:]
seen = {"uid": os.getuid(), "writable": [], "capabilities": 0}
for folder in ("/", "/srv", "/srv/demo", "/etc", str(Path(program).parent), "/tmp", os.environ["HOME"], "/dev/shm"):
    try:
        (Path(folder) / "tried").touch()
        (Path(folder) / "tried").unlink()
        seen["writable"].append(folder)
    except OSError:
        pass
status = Path("/proc/self/status").read_text()
seen["capabilities"] = sum(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Cap"))

def healthy():
    return subprocess.run([script, "demo", http, metrics], capture_output=True, timeout=30).returncode == 0

def until(wanted, limit_s=60):
    end = time.monotonic() + limit_s
    while healthy() is not wanted:
        if time.monotonic() > end or server.poll() is not None:
            return False
        time.sleep(0.05)
    return True

def core():
    for folder in set(Path("/proc").glob("[0-9]*")) - {Path(f"/proc/{os.getpid()}")}:
        try:
            is_dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            if not is_dead and b"pageflight.loop.core_process" in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:
            pass

options = ["--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics, "--exit-timeout-secs", "5"]
server = subprocess.Popen([program, "serve", "/srv/demo", *options], stdout=2)
seen["before"] = healthy()
seen["started"] = until(True)
ask = ["curl", "-fsS", "-m", "30", f"http://127.0.0.1:{http}/v2/models/demo/generate", "-d"]
answer = subprocess.run([*ask, json.dumps({"text_input": "def f(", "max_tokens": 4})], capture_output=True)
seen["answered"] = answer.returncode == 0 and "text_output" in json.loads(answer.stdout)
first = core()
os.kill(first, signal.SIGKILL)
end = time.monotonic() + 60
while (second := core()) in (None, first) and time.monotonic() < end:
    time.sleep(0.005)
os.kill(second, signal.SIGSTOP)  # as it starts: there is none for as long as we like
seen["noticed"] = until(False)
os.kill(second, signal.SIGCONT)
seen["recovered"] = until(True)
server.terminate()
seen["status"] = server.wait(60)
seen["left"] = sorted(path.name for path in Path("/dev/shm").iterdir())
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, built."""
    folder = tmp_path_factory.mktemp("repositories")
    build(
        BuildOptions(
            checkpoint=ROOT / "build" / "demo_checkpoint",
            repository=folder / "demo",
            name="demo",
            engine=EngineOptions(dtype="fp32"),
            serving=ServingOptions(kv_memory=16 << 20),
        )
    )
    return folder


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def why_not() -> str:
    """What keeps this machine from it; empty where nothing does."""
    home = sysconfig.get_path("data")
    if Path(home).is_relative_to("/tmp") or ROOT.is_relative_to("/tmp"):
        return "the program lies in /tmp, which becomes empty"
    if not all(map(shutil.which, ("unshare", "setpriv", "curl"))):
        return "unshare, setpriv or curl is missing"
    tried = subprocess.run([*CONFINE, "/etc", "/media", "true"], capture_output=True, text=True, check=False)
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


def test_a_server_needs_no_more_than_the_manifests_give(repositories: Path) -> None:
    """With a read-only root the caches, the sockets and the probes of a server had nowhere to go, or nothing to ask."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    program = Path(sys.executable).parent / "pageflight"
    command = [sys.executable, "-c", textwrap.dedent(INSIDE), str(program), str(ROOT / "scripts" / "healthy")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "TMPDIR"))}
    done = subprocess.run(
        [*CONFINE, str(repositories), "/media", *command, *free_ports(3)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen == {
        "uid": int(UID),
        "capabilities": 0,
        "writable": ["/tmp", "/media", "/dev/shm"],
        "before": False,
        "started": True,
        "answered": True,
        "noticed": True,
        "recovered": True,
        "status": 0,
        "left": [],
    }, done.stderr
    assert len(seen["writable"]) == len(WRITABLE), "the manifests' home is /media here"
