"""What no schema says of a manifest: whether its parts fit each other, the image, the command line and the server."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import typer
import typer.main
from manifests import ROOT, SET, Document, PodOf, number_of, option, pods_of

from pageflight.cli.main import app
from pageflight.cli.server_process import _UNLOAD_S

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
IN_IMAGE = "/opt/pageflight/"
WRITABLE = frozenset({"/tmp", "/home/pageflight", "/dev/shm"})
"""Where a server writes; `test_read_only_root` shows that it is enough."""
RANK_PORT = 29600
Rule = Callable[[list[Document]], Iterator[str]]


def problems(documents: list[Document]) -> list[str]:
    """Everything that is wrong with the documents of one folder, each in a sentence."""
    return [problem for rule in RULES for problem in rule(documents)]


def privileges(documents: list[Document]) -> Iterator[str]:
    """As little as the restricted pod security standard allows, and the root file system read-only."""
    uid = re.search(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)
    assert uid is not None, "the image's user is a number"
    for pod in pods_of(documents):
        own = pod.spec.get("securityContext", {})
        expected = {"runAsNonRoot": True, "runAsUser": int(uid[1]), "runAsGroup": int(uid[2]), "fsGroup": int(uid[2])}
        for name, value in expected.items():
            if own.get(name) != value:
                yield f"{pod.owner}: {name} is {own.get(name)!r}, the image's is {value!r}"
        if own.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.owner}: no seccomp profile"
        if pod.spec.get("automountServiceAccountToken") is not False or pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.owner}: the cluster's token or Services are in it"
        if any(pod.spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{pod.owner}: shares the host's namespaces"
        for container in pod.containers:
            wanted = {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            if container.get("securityContext") != wanted:
                yield f"{pod.owner}/{container['name']}: securityContext is {container.get('securityContext')}"


def resources(documents: list[Document]) -> Iterator[str]:
    """Limits of everything; what is counted in whole devices is a limit, which is the request too."""
    for pod in pods_of(documents):
        in_memory = sum(
            number_of(volume["emptyDir"]["sizeLimit"])
            for volume in pod.spec["volumes"]
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        )
        for container in pod.containers:
            where, given = f"{pod.owner}/{container['name']}", container.get("resources", {})
            limits, requests = given.get("limits", {}), given.get("requests", {})
            for name in ("cpu", "memory", "ephemeral-storage"):
                if name not in limits or name not in requests:
                    yield f"{where}: no limit or request of {name}"
                elif number_of(requests[name]) > number_of(limits[name]):
                    yield f"{where}: asks for more {name} than it may use"
            if "memory" in limits and 2 * in_memory > number_of(limits["memory"]):
                yield f"{where}: shared memory, which counts as its memory, may take more than half"


def volumes(documents: list[Document]) -> Iterator[str]:
    """What is mounted exists, what exists is mounted; what the server writes to is writable, its repository is not."""
    for pod in pods_of(documents):
        known = {volume["name"]: volume for volume in pod.spec["volumes"]}
        used = {mount["name"] for container in pod.containers for mount in container["volumeMounts"]}
        for name in sorted(used ^ set(known)):
            yield f"{pod.owner}: volume {name} is not there, or for nobody"
        for name, volume in known.items():
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{pod.owner}: volume {name} has no limit"
        if "shm" in known and known["shm"].get("emptyDir", {}).get("medium") != "Memory":
            yield f"{pod.owner}: /dev/shm lies on a disk"
        for container in pod.containers:
            arguments = container.get("args")
            if not arguments:
                continue
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            where = f"{pod.owner}/{container['name']}"
            for path in sorted(WRITABLE - {path for path, mount in mounts.items() if not mount.get("readOnly")}):
                yield f"{where}: cannot write to {path}"
            if bool(mounts.get("/repositories", {}).get("readOnly")) is (arguments[0] == "build"):
                yield f"{where}: {arguments[0]} has its repository in the wrong mode"
            if {"name": "HOME", "value": "/home/pageflight"} not in container["env"]:
                yield f"{where}: HOME is not the writable one"


def commands(documents: list[Document]) -> Iterator[str]:
    """The image is one that the documentation builds; the command line takes the arguments."""
    built = set(re.findall(r"docker build -t (\S+)", DOCKERFILE + (ROOT / "docs" / "gpu_host.md").read_text("utf-8")))
    for pod in pods_of(documents):
        for container in pod.containers:
            where = f"{pod.owner}/{container['name']}"
            if container["image"] not in built:
                yield f"{where}: nothing in the documentation builds {container['image']}"
            needs_gpu = any("nvidia.com" in name for name in container["resources"].get("limits", {}))
            if needs_gpu is not container["image"].endswith(":gpu"):
                yield f"{where}: image {container['image']} does not fit its devices"
            arguments = container.get("args")
            if arguments:
                yield from _unparsable(where, arguments)
            for variable in container.get("env", []):
                if variable["name"].endswith("_KEY_FILE") and not _is_secret(pod, container, variable["value"]):
                    yield f"{where}: {variable['name']} is in no secret that is mounted"


def _unparsable(where: str, arguments: list[str]) -> Iterator[str]:
    command = COMMANDS.get(arguments[0])
    if command is None:
        yield f"{where}: there is no command {arguments[0]}"
        return
    try:
        command.make_context(arguments[0], list(arguments[1:]), parent=typer.Context(typer.main.get_command(app)))
    except Exception as error:  # of many kinds, whose base typer does not export
        yield f"{where}: {error}"


def _is_secret(pod: PodOf, container: dict[str, Any], path: str) -> bool:
    secrets = {volume["name"] for volume in pod.spec["volumes"] if "secret" in volume}
    return any(
        mount["name"] in secrets and path.startswith(f"{mount['mountPath']}/") for mount in container["volumeMounts"]
    )


def probes(documents: list[Document]) -> Iterator[str]:
    """Whoever answers clients is asked whether it computes, and is given time to start, to recover and to drain."""
    for pod in pods_of(documents):
        for container in pod.spec["containers"]:
            ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
            arguments, where = container.get("args", []), f"{pod.owner}/{container['name']}"
            for name in [name for name in container if name.endswith("Probe")]:
                asked = container[name].get("httpGet", {}).get("port")
                if asked is not None and asked not in ports:
                    yield f"{where}: {name} asks port {asked}, which it does not have"
            if "http" not in ports:
                continue
            if {"http": 8000, "grpc": 8001, "metrics": 8002}.items() - ports.items():
                yield f"{where}: ports {ports} are not those of the server"
            if missing := {"startupProbe", "readinessProbe", "livenessProbe"} - set(container):
                yield f"{where}: no {', '.join(sorted(missing))}"
                continue
            ready, alive = container["readinessProbe"], container["livenessProbe"]
            script, *names = ready.get("exec", {}).get("command", [""])
            if names != [arguments[1].rpartition("/")[2]] or not (ROOT / script.removeprefix(IN_IMAGE)).is_file():
                yield f"{where}: readiness is not that of the model that it serves"
            for probe in (ready, alive):
                if probe.get("timeoutSeconds", 1) <= _asking_s():
                    yield f"{where}: a probe ends before the {_asking_s():g} s that its questions may take"
            if alive.get("exec") != ready.get("exec"):
                yield f"{where}: liveness is another question than readiness"
            if _patience_s(alive) < 10 * _patience_s(ready) or _patience_s(alive) < 600:
                yield f"{where}: it would be killed while a core of it restarts"


def draining(documents: list[Document]) -> Iterator[str]:
    """Streams end before the pod does, and a worker's ranks after its leader's streams."""
    leader_s = 0.0
    for pod in pods_of(documents):
        for container in pod.spec["containers"]:
            if not container.get("args"):
                continue
            where = f"{pod.owner}/{container['name']}"
            words = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["", "0"])
            limit_s, needed_s = float(words[1]), float(words[1])
            if pod.role == "worker":
                if limit_s < leader_s:
                    yield f"{where}: ends {leader_s - limit_s:g} s before its leader may"
            else:
                if words[0] != "sleep" or limit_s < 5:
                    yield f"{where}: refuses new requests while balancers still send them"
                needed_s += float(option(container["args"], "--exit-timeout-secs") or 0) + _UNLOAD_S
                leader_s = needed_s
            if pod.spec.get("terminationGracePeriodSeconds", 30) < needed_s + 5:
                yield f"{where}: is killed before the {needed_s:g} s that draining may take"


def selectors(documents: list[Document]) -> Iterator[str]:
    """Whoever selects finds pods; each server has a Service, a budget and a network policy."""
    pods = list(pods_of(documents))
    for document in documents:
        kind, name, spec = document["kind"], document["metadata"]["name"], document["spec"]
        selector = spec.get("selector", spec.get("podSelector"))
        if selector is None:
            continue
        wanted = selector if kind == "Service" else selector["matchLabels"]
        chosen = [pod for pod in pods if wanted.items() <= pod.labels.items()]
        if not chosen:
            yield f"{kind} {name} selects nothing"
        for pod in chosen:
            named = {port["name"] for container in pod.containers for port in container.get("ports", [])}
            if kind == "Service" and (missing := {port["targetPort"] for port in spec["ports"]} - named):
                yield f"Service {name} sends to {', '.join(sorted(missing))}, which {pod.role} {pod.owner} lacks"
        sets = {pod.owner for pod in pods if SET in pod.labels}
        if kind == "Service" and name in sets:
            yield f"Service {name} takes the name by which the set's pods find each other"
    serving = any(port["containerPort"] == 8000 for pod in pods for c in pod.containers for port in c.get("ports", []))
    kinds = {document["kind"] for document in documents}
    if serving and (missing := {"Service", "PodDisruptionBudget", "NetworkPolicy"} - kinds):
        yield f"no {', '.join(sorted(missing))}"


def updates(documents: list[Document]) -> Iterator[str]:
    """Updates and drained nodes take nothing away before something else is ready."""
    for document in documents:
        name, spec = document["metadata"]["name"], document["spec"]
        if document["kind"] == "Deployment":
            rolling = spec["strategy"]["rollingUpdate"]
            if spec["replicas"] < 2:
                yield f"{name}: one pod is none while its node is drained"
        elif document["kind"] == "LeaderWorkerSet":
            rolling, template = spec["rolloutStrategy"]["rollingUpdateConfiguration"], spec["leaderWorkerTemplate"]
            if template["restartPolicy"] != "None":
                yield f"{name}: a lost worker takes its leader with it, and all streams"
            if spec["startupPolicy"] != "LeaderCreated":
                yield f"{name}: workers wait for a leader that waits for them"
        else:
            continue
        if rolling["maxUnavailable"] != 0 or rolling["maxSurge"] < 1:
            yield f"{name}: an update takes pods away before there are new ones"


def networks(documents: list[Document]) -> Iterator[str]:
    """The world reaches the server's three ports, ranks reach each other, and nobody else reaches them."""
    serving = {8000, 8001, 8002}
    for document in documents:
        if document["kind"] != "NetworkPolicy":
            continue
        name, spec = document["metadata"]["name"], document["spec"]
        if set(spec["policyTypes"]) != {"Ingress", "Egress"}:
            yield f"{name}: leaves a direction open"
        for rule in [rule for rule in spec["ingress"] if "from" not in rule]:
            open_ports = {port["port"] for port in rule.get("ports", [])}
            if open_ports != serving:
                yield f"{name}: {sorted(open_ports) or 'all ports'} are open to everybody"
        own = {"podSelector": spec["podSelector"]}
        has_ranks = any(
            port["containerPort"] == RANK_PORT
            for pod in pods_of(documents)
            for container in pod.containers
            for port in container.get("ports", [])
        )
        inner = [rule for rule in spec["ingress"] if rule.get("from") == [own] and "ports" not in rule]
        outer = [rule for rule in spec["egress"] if rule.get("to") == [own] and "ports" not in rule]
        if has_ranks is not bool(inner and outer):
            yield f"{name}: ranks do not reach each other, or others do"


@cache
def _asking_s() -> float:
    """The longest that `scripts/healthy` can take: the limits of all that it asks, seen by a curl that answers."""
    with tempfile.TemporaryDirectory() as name:
        curl, asked = Path(name) / "curl", Path(name) / "asked"
        curl.write_text(f'#!/bin/sh\necho "$@" >>{asked}\necho "pageflight_engine_ready 1"\n', encoding="utf-8")
        curl.chmod(0o755)
        path = f"{name}{os.pathsep}{os.environ['PATH']}"
        subprocess.run([ROOT / "scripts" / "healthy", "m"], env={**os.environ, "PATH": path}, check=True)
        questions = asked.read_text(encoding="utf-8").splitlines()
    limits = [re.search(r"-m (\d+)", question) for question in questions]
    assert len(limits) >= 4
    assert all(limits), "a question without a limit"
    return sum(float(limit[1]) for limit in limits if limit)


def _patience_s(probe: dict[str, Any]) -> float:
    return float(probe["periodSeconds"] * probe["failureThreshold"])


RULES: tuple[Rule, ...] = (
    privileges,
    resources,
    volumes,
    commands,
    probes,
    draining,
    selectors,
    updates,
    networks,
)
