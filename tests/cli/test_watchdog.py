"""The watchdog against processes that keep a ledger as stubs do, and a server that only writes down its orders."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from pageflight.backend.ledger import Page, pages
from pageflight.cli.dead_stub import SettlePatience
from pageflight.cli.errors import ServerError
from pageflight.cli.server_flags import ServerFlags
from pageflight.cli.server_guard import ServerGuard
from pageflight.cli.tritonserver import ServerCommand
from pageflight.cli.watchdog import Patience, Watchdog
from pageflight.core.wire import END_REQUESTS_OF
from pageflight.loop.address import process_start, stub_folder
from pageflight.loop.clock import ManualClock

STUB = """
import os, sys, threading
from types import SimpleNamespace
from pageflight.backend.ledger import Ledger
model, kind, instance, opened, pending = sys.argv[1:]
ledger = Ledger(SimpleNamespace(name=model, instance=int(instance), server_pid=os.getppid()), kind)
slots = [ledger.enter((16 * number + 16, 16 * number + 4096)) for number in range(int(opened) + int(pending))]
for slot in slots[: int(opened)]:
    ledger.take_over(slot)
print("up", flush=True)
while sys.stdin.readline() == "answer\\n":
    ledger.leave(slots.pop())
ledger.close()
"""


def eventually(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    return process_start(pid) is not None


@dataclass
class Stubs:
    """This process is their tritonserver: they are its children."""

    running: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(
        self, model: str, kind: str = "front", *, instance: int = 0, opened: int = 0, pending: int = 0
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", STUB, model, kind, str(instance), str(opened), str(pending)]
        stub = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.running.append(stub)
        assert stub.stdout is not None and stub.stdout.readline() == "up\n"
        return stub

    def page(self, stub: subprocess.Popen[str]) -> Page | None:
        return Page.of(stub_folder(os.getpid()) / str(stub.pid))


@pytest.fixture
def stubs() -> Iterator[Stubs]:
    made = Stubs()
    yield made
    for stub in made.running:
        stub.kill()
        stub.communicate()
    shutil.rmtree(stub_folder(os.getpid()), ignore_errors=True)


@dataclass
class Orders:
    """A server that writes down what it is asked for."""

    on_load: Callable[[str], object] = lambda model: None
    on_unload: Callable[[str], object] = lambda model: None
    num_handed_over: int = 0
    gives_up: bool = False
    taken: list[str] = field(default_factory=list)

    def unload(self, model: str) -> None:
        self.taken.append(f"unload {model}")
        self.on_unload(model)

    def load(self, model: str) -> None:
        self.taken.append(f"load {model}")
        self.on_load(model)

    def num_successes(self, model: str) -> int:
        return self.num_handed_over

    def infer(self, model: str, tensor: str, text: str, parameters: dict[str, str]) -> None:
        for page in pages(stub_folder(os.getpid())):
            if page.owner.secret == parameters[END_REQUESTS_OF]:
                self.taken.append(f"{model} ends {len(page.open_requests())}")
                page.path.rename(page.given_up) if self.gives_up else page.path.unlink()
                return
        raise ServerError("no such stub")


@dataclass
class Watched:
    watchdog: Watchdog
    told: list[str]

    def has_told(self, text: str) -> bool:
        return any(text in line for line in self.told)


@pytest.fixture
def watch() -> Iterator[Callable[..., Watched]]:
    """Starts a watchdog in a hurry."""
    started: list[Watchdog] = []

    def start(orders: Orders, *, can_reload: bool = True, **limits: float) -> Watched:
        told: list[str] = []
        settle = SettlePatience(sent_s=0.0, refused_s=0.2, decide_s=0.5, end_s=1.0)
        patience = Patience(**{"look_s": 0.02, "backoff_s": 0.01, **limits}, settle=settle)  # type: ignore[arg-type]
        watchdog = Watchdog(os.getpid(), orders, told.append, can_reload=can_reload, patience=patience)
        started.append(watchdog)
        watchdog.start()
        return Watched(watchdog, told)

    yield start
    for watchdog in started:
        watchdog.stop()


Watch = Callable[..., Watched]


def test_a_dead_stub_s_requests_are_ended_and_its_model_is_loaded_again(stubs: Stubs, watch: Watch) -> None:
    orders = Orders(on_load=lambda model: stubs.start(model))
    stubs.start("preprocessing", "preprocessing")
    victim = stubs.start("demo", opened=3)
    watched = watch(orders)
    victim.kill()
    eventually(lambda: watched.has_told("demo is back"))
    eventually(lambda: "preprocessing ends 3" in orders.taken)
    assert [order for order in orders.taken if "load" in order] == ["unload demo", "load demo"]
    assert watched.has_told(f"demo instance 0 (process {victim.pid}) died of SIGKILL with 3 open requests; noticed")
    assert watched.has_told("; deaths=1")


def test_a_death_is_noticed_with_the_next_look(stubs: Stubs) -> None:
    """Two seconds are promised; nothing said how long it takes, and tests waited for thirty."""
    patience, clock = Patience(), ManualClock(100.0)
    watchdog = Watchdog(os.getpid(), Orders(), lambda text: None, can_reload=False, patience=patience, clock=clock)
    victims = [stubs.start("demo"), stubs.start("engine")]
    for victim in victims:
        watchdog.look()
        alive_s = clock()
        victim.kill()
        eventually(lambda victim=victim: not is_alive(victim.pid))  # type: ignore[misc]
        clock.advance(patience.look_s)
        watchdog.look()
        death = watchdog.deaths[-1]
        assert (death.page.owner.stub_pid, death.alive_s, death.noticed_s) == (victim.pid, alive_s, clock())
    watchdog.stop()
    assert len(watchdog.deaths) == 2
    # What a look costs is some milliseconds; the rest is left for a machine that has other things to do.
    assert all(death.noticed_s - death.alive_s == patience.look_s < 0.5 for death in watchdog.deaths)


def test_a_server_that_does_not_answer_delays_no_look(stubs: Stubs) -> None:
    """Orders take as long as they take; who waits for them is not who looks."""
    released, told = threading.Event(), list[str]()
    orders = Orders(on_unload=lambda model: released.wait(20))
    watchdog = Watchdog(os.getpid(), orders, told.append, clock=ManualClock())
    for model in ("demo", "engine"):
        victim = stubs.start(model)
        watchdog.look()
        victim.kill()
        eventually(lambda victim=victim: not is_alive(victim.pid))  # type: ignore[misc]
        watchdog.look()
        eventually(lambda model=model: f"unload {model}" in orders.taken)  # type: ignore[misc]
    assert not released.is_set() and watchdog.num_deaths == 2
    watchdog.stop()
    released.set()


def test_a_draining_server_s_dead_stubs_are_not_loaded_but_their_requests_end(stubs: Stubs, watch: Watch) -> None:
    """The watchdog was stopped first: clients of a stub that died during the drain heard "Socket closed" at the end."""
    orders = Orders()
    stubs.start("preprocessing", "preprocessing")
    victim = stubs.start("demo", opened=2)
    watched = watch(orders)
    watched.watchdog.stop_reloads()
    victim.kill()
    eventually(lambda: "preprocessing ends 2" in orders.taken)
    eventually(lambda: watched.has_told("demo is not loaded again: the server ends"))
    assert orders.taken == ["preprocessing ends 2"]


def test_a_reload_that_waits_is_given_up_when_the_server_drains(stubs: Stubs, watch: Watch) -> None:
    orders = Orders(on_load=lambda model: stubs.start(model).kill())
    victim = stubs.start("demo")
    watched = watch(orders, backoff_s=60.0)
    victim.kill()
    eventually(lambda: orders.taken == ["unload demo", "load demo", "unload demo"])
    watched.watchdog.stop_reloads()
    eventually(lambda: not [thread for thread in threading.enumerate() if thread.name == "watchdog-_bring_back"])
    assert len(orders.taken) == 3


def test_requests_that_cannot_be_ended_are_told_and_not_waited_for(stubs: Stubs, watch: Watch) -> None:
    """A stub that found Triton's memory other than it knows removed the ledger, and nobody heard of the requests."""
    orders = Orders(gives_up=True)
    stubs.start("preprocessing", "preprocessing")
    victim = stubs.start("demo", opened=2)
    page = stubs.page(victim)
    watched = watch(orders)
    victim.kill()
    eventually(lambda: watched.has_told("cannot be ended and wait for ever: the server's log has the reason"))
    assert page is not None
    eventually(lambda: not page.given_up.exists())


def test_a_stub_that_ends_as_it_should_is_no_death(stubs: Stubs, watch: Watch) -> None:
    """Every unloaded model would have been loaded again."""
    orders = Orders()
    leaving, other = stubs.start("demo"), stubs.start("engine")
    watched = watch(orders)
    leaving.communicate("\n")
    other.kill()
    eventually(lambda: "load engine" in orders.taken)
    assert orders.taken == ["unload engine", "load engine"] and watched.watchdog.num_deaths == 1


@pytest.mark.parametrize(("num_handed_over", "ended"), [(3, "preprocessing ends 3"), (2, "preprocessing ends 2")])
def test_what_tritonserver_ends_itself_is_not_ended_twice(
    stubs: Stubs, watch: Watch, num_handed_over: int, ended: str
) -> None:
    """A second end of a request brings tritonserver down; no end leaves its client waiting."""
    orders = Orders(num_handed_over=num_handed_over)
    stubs.start("preprocessing", "preprocessing")
    victim = stubs.start("demo", opened=2, pending=1)
    watch(orders)
    victim.kill()
    eventually(lambda: "load demo" in orders.taken)
    eventually(lambda: ended in orders.taken)


def test_requests_that_no_count_explains_are_told_and_left(stubs: Stubs, watch: Watch) -> None:
    orders = Orders(num_handed_over=17)
    stubs.start("preprocessing", "preprocessing")
    victim = stubs.start("demo", pending=1)
    watched = watch(orders)
    victim.kill()
    eventually(lambda: watched.has_told("leaves 1 requests of unknown state"))
    eventually(lambda: "load demo" in orders.taken)
    assert not watched.has_told("cannot be ended")
    assert not any("ends" in order for order in orders.taken)


def test_two_stubs_of_a_model_that_die_together_are_one_reload(stubs: Stubs, watch: Watch) -> None:
    orders = Orders()
    victims = [stubs.start("demo", instance=instance) for instance in range(2)]
    watched = watch(orders, look_s=0.2)
    for victim in victims:
        victim.kill()
    eventually(lambda: watched.watchdog.num_deaths == 2 and watched.has_told("demo is back"))
    assert orders.taken == ["unload demo", "load demo"]


@pytest.mark.parametrize("opened", [0, 1])
def test_siblings_that_tritonserver_forgot_are_ended_when_they_have_nothing_to_do(
    stubs: Stubs, watch: Watch, opened: int
) -> None:
    """A model with a stub that died in the middle of an exchange was never unloaded; its healthy stub stayed beside the
    new ones, 50 MB for each death."""
    sibling, victim = stubs.start("demo", opened=opened), stubs.start("demo", instance=1)
    page, fresh = stubs.page(sibling), []
    watched = watch(Orders(on_load=lambda model: fresh.append(stubs.start(model))), unload_s=0.2)
    victim.kill()
    assert page is not None
    if opened:
        eventually(lambda: watched.has_told("demo is back"))
        time.sleep(0.5)
        assert sibling.poll() is None and not watched.has_told("it is ended")
        assert sibling.stdin is not None
        sibling.stdin.write("answer\n")
        sibling.stdin.flush()
    eventually(lambda: sibling.poll() == -signal.SIGKILL)
    eventually(lambda: not page.path.exists())
    assert watched.has_told("was replaced and has nothing to do; it is ended")
    assert watched.watchdog.num_deaths == 1 and fresh[0].poll() is None


def test_a_model_that_dies_again_and_again_is_left_unloaded(stubs: Stubs, watch: Watch) -> None:
    """A model that cannot live was loaded for ever, at the cost of all others."""
    orders = Orders(on_load=lambda model: stubs.start(model).kill())
    victim = stubs.start("demo")
    watched = watch(orders, max_short_lives=3)
    victim.kill()
    eventually(lambda: watched.has_told("it stays unloaded"))
    assert orders.taken == ["unload demo", "load demo"] * 3 + ["unload demo"]


def test_a_load_that_fails_is_tried_again(stubs: Stubs, watch: Watch) -> None:
    failures = iter([ServerError("no memory"), ServerError("no memory")])

    def on_load(model: str) -> None:
        for failure in failures:
            raise failure

    orders = Orders(on_load=on_load)
    victim = stubs.start("demo")
    watched = watch(orders)
    victim.kill()
    eventually(lambda: watched.has_told("demo is back"))
    assert orders.taken.count("load demo") == 3 and watched.has_told("load demo: no memory")


def test_a_server_that_takes_no_orders_gets_none(stubs: Stubs, watch: Watch) -> None:
    orders = Orders()
    stubs.start("preprocessing", "preprocessing")
    victim = stubs.start("demo", opened=1)
    watched = watch(orders, can_reload=False)
    victim.kill()
    eventually(lambda: "preprocessing ends 1" in orders.taken)
    eventually(lambda: watched.has_told("demo stays as it is"))
    assert len(orders.taken) == 1


def test_a_stub_without_a_sign_of_life_is_told_of_and_left_alone(stubs: Stubs, watch: Watch) -> None:
    orders = Orders()
    victim = stubs.start("demo")
    watched = watch(orders, stuck_after_s=1.5)
    victim.send_signal(signal.SIGSTOP)
    eventually(lambda: watched.has_told(f"demo instance 0 (process {victim.pid}) has given no sign of life for"))
    victim.send_signal(signal.SIGCONT)
    eventually(lambda: watched.has_told("is alive again"))
    assert orders.taken == [] and len(watched.told) == 2


def test_a_stub_that_hangs_is_killed_only_when_asked_to(stubs: Stubs, watch: Watch) -> None:
    orders = Orders()
    victim = stubs.start("demo")
    watched = watch(orders, restart_stuck_after_s=1.5)
    victim.send_signal(signal.SIGSTOP)
    eventually(lambda: watched.has_told("demo is back"))
    assert watched.has_told("is killed after") and orders.taken == ["unload demo", "load demo"]


def test_a_server_with_dead_models_only_is_not_waited_for(stubs: Stubs, watch: Watch) -> None:
    """Triton cannot unload a model whose stub died in the middle of an exchange; draining took all its time."""
    victim, other = stubs.start("demo"), stubs.start("engine")
    watched = watch(Orders())
    victim.kill()
    eventually(lambda: watched.watchdog.num_deaths == 1)
    assert not watched.watchdog.only_corpses_are_left()
    other.communicate("\n")
    assert watched.watchdog.only_corpses_are_left()


def command(*arguments: str) -> ServerCommand:
    return ServerCommand(arguments=("tritonserver", *arguments), environment={}, added_environment={})


@pytest.mark.parametrize("given", [("--model-control-mode=poll",), ("--model-control-mode", "none")])
def test_a_person_s_own_control_mode_is_respected(given: tuple[str, ...]) -> None:
    assert ServerGuard(command(*given), ServerFlags()).command.arguments == ("tritonserver", *given)


def test_the_server_obeys_a_key_that_nobody_can_guess() -> None:
    guards = [ServerGuard(command(), ServerFlags()).command.arguments for _ in range(2)]
    assert guards[0] != guards[1]
    for name in ("--http-restricted-api=model-repository:", "--grpc-restricted-protocol=model-repository:"):
        assert any(argument.startswith(name) for argument in guards[0])
    assert ServerGuard(command(), ServerFlags(watchdog=False)).command.arguments == ("tritonserver",)
