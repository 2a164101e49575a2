"""The manifests in build/kubernetes are valid, fit each other and the program; broken ones are told."""

from __future__ import annotations

import copy
import itertools
import os
import re
import subprocess
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from manifest_rules import problems
from manifest_schemas import check
from manifests import FOLDERS, ROOT, Document, option, pods_of, read

BY_NAME = {folder.name: folder for folder in FOLDERS}
Change = Callable[[dict[str, Document]], Any]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_manifest_is_one(folder: Path) -> None:
    """A field one level too high was dropped by the API server without a word."""
    documents = read(folder)
    assert documents
    for document in documents:
        check(document)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_parts_of_a_folder_fit(folder: Path) -> None:
    """Valid manifests selected nothing, mounted nothing and passed options that had been renamed."""
    assert problems(read(folder)) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_kustomization_names_every_manifest_beside_it(folder: Path) -> None:
    """`kubectl apply -k` left out the last file. It has no ending: `apply -f` would take it for a manifest."""
    kustomization = yaml.safe_load((folder / "Kustomization").read_text(encoding="utf-8"))
    assert kustomization == {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [path.name for path in sorted(folder.glob("*.yaml"))],
    }
    assert {path.suffix for path in folder.iterdir()} == {"", ".yaml"}


def container(documents: dict[str, Document], template: str = "template") -> dict[str, Any]:
    """The server's container."""
    deployment = documents.get("Deployment")
    spec = deployment["spec"] if deployment else documents["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    return spec[template]["spec"]["containers"][0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("folder", "change"),
    [
        ("demo", lambda d: d["Deployment"]["spec"].update(securityContext={})),
        ("demo", lambda d: container(d)["resources"]["limits"].update(memory={"size": 5})),
        ("demo", lambda d: container(d)["readinessProbe"].update(failureTreshold=3)),
        ("demo", lambda d: d["Service"]["spec"]["ports"][0].pop("port")),
        ("gpu", lambda d: d["PodDisruptionBudget"]["spec"].update(maxUnavailable=1.5)),
        ("nodes", lambda d: d["LeaderWorkerSet"]["spec"].update(size=2)),
        ("nodes", lambda d: d["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"].update(restartPolicy="Never")),
        ("nodes", lambda d: d["LeaderWorkerSet"]["spec"]["rolloutStrategy"].pop("type")),
        ("nodes", lambda d: container(d, "workerTemplate").update(imagePullpolicy="Never")),
    ],
)
def test_what_the_api_does_not_know_is_told(folder: str, change: Change) -> None:
    """Whoever checks leniently finds nothing: a misspelt field is an unknown one."""
    documents = {document["kind"]: copy.deepcopy(document) for document in read(BY_NAME[folder])}
    change(documents)
    with pytest.raises(jsonschema.ValidationError):
        for document in documents.values():
            check(document)


@pytest.mark.parametrize(
    ("folder", "change", "problem"),
    [
        ("demo", lambda d: container(d)["securityContext"].update(readOnlyRootFilesystem=False), "securityContext is"),
        ("demo", lambda d: container(d)["securityContext"]["capabilities"].update(add=["NET_ADMIN"]), "capabilities"),
        ("demo", lambda d: d["Deployment"]["spec"]["template"]["spec"]["securityContext"].update(runAsUser=0), "runAs"),
        ("demo", lambda d: container(d)["resources"]["limits"].pop("ephemeral-storage"), "no limit or request of eph"),
        ("demo", lambda d: container(d)["volumeMounts"].pop(), "cannot write to /dev/shm"),
        ("demo", lambda d: container(d)["volumeMounts"][0].pop("readOnly"), "in the wrong mode"),
        ("demo", lambda d: container(d)["volumeMounts"][0].update(name="data"), "volume data is not there"),
        ("demo", lambda d: container(d)["args"].append("--exit-timeout=5"), "(?i)no such option"),
        ("demo", lambda d: container(d).update(args=["server", "/repositories/demo"]), "there is no command server"),
        ("demo", lambda d: container(d).update(image="pageflight:v1"), "nothing in the documentation builds"),
        ("gpu", lambda d: container(d).update(image="pageflight"), "does not fit its devices"),
        ("demo", lambda d: container(d)["startupProbe"]["httpGet"].update(port="web"), "asks port web"),
        ("demo", lambda d: container(d)["readinessProbe"]["exec"]["command"].append("x"), "is not that of the model"),
        ("demo", lambda d: container(d)["livenessProbe"].update(failureThreshold=3), "killed while a core"),
        ("demo", lambda d: container(d)["readinessProbe"].update(timeoutSeconds=8), "ends before the 8 s"),
        ("demo", lambda d: container(d)["livenessProbe"].pop("timeoutSeconds"), "ends before the 8 s"),
        ("demo", lambda d: container(d)["args"].__setitem__(2, "--exit-timeout-secs=150"), "before the 170 s"),
        ("demo", lambda d: container(d).pop("lifecycle"), "while balancers still send"),
        (
            "demo",
            lambda d: d["Service"]["spec"]["selector"].update({"app.kubernetes.io/instance": "x"}),
            "Service .* no",
        ),
        ("demo", lambda d: d["Service"]["spec"]["ports"][1].update(targetPort="gprc"), "sends to gprc"),
        ("demo", lambda d: d.pop("PodDisruptionBudget"), "no PodDisruptionBudget"),
        ("demo", lambda d: d["Deployment"]["spec"]["strategy"]["rollingUpdate"].update(maxUnavailable=1), "takes pods"),
        ("demo", lambda d: d["NetworkPolicy"]["spec"]["ingress"][0].pop("ports"), "are open to everybody"),
        ("nodes", lambda d: d["NetworkPolicy"]["spec"]["ingress"][1].pop("from"), "are open to everybody"),
        ("nodes", lambda d: d["NetworkPolicy"]["spec"]["egress"].pop(0), "ranks do not reach each other"),
        ("nodes", lambda d: d["Service"]["metadata"].update(name="pageflight-large"), "find each other"),
        ("nodes", lambda d: d["Service"]["spec"]["selector"].popitem(), "sends to grpc, http, metrics, which worker"),
        (
            "nodes",
            lambda d: d["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"].update(
                restartPolicy="RecreateGroupOnPodRestart"
            ),
            "a lost worker takes its leader",
        ),
        (
            "nodes",
            lambda d: container(d, "workerTemplate")["lifecycle"]["preStop"]["exec"]["command"].__setitem__(1, "30"),
            "before its leader may",
        ),
        ("nodes", lambda d: container(d, "leaderTemplate")["env"][1].update(value="/tmp/key"), "in no secret"),
    ],
)
def test_what_does_not_fit_is_told(folder: str, change: Change, problem: str) -> None:
    """Each of these was valid for the API server, and wrong."""
    documents = {document["kind"]: copy.deepcopy(document) for document in read(BY_NAME[folder])}
    change(documents)
    assert any(re.search(problem, found) for found in problems(list(documents.values())))


def test_the_set_has_the_machines_that_its_model_is_built_for() -> None:
    """The documented build and the manifest disagreed: the server refused to start."""
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8").replace("\\\n", " ")
    words = next(line for line in text.splitlines() if "--launcher external" in line).split()
    given = {word: words[number + 1] for number, word in enumerate(words[:-1])}
    (manifest,) = (document for document in read(BY_NAME["nodes"]) if document["kind"] == "LeaderWorkerSet")
    size = manifest["spec"]["leaderWorkerTemplate"]["size"]
    gpus = [pod.containers[0]["resources"]["limits"]["nvidia.com/gpu"] for pod in pods_of([manifest])]
    assert size == int(given["--nodes"]) and gpus == [8, 8]
    assert int(given["--tensor-parallel"]) * int(given["--pipeline-parallel"]) == size * gpus[0]
    assert given["--name"] in {pod.containers[0]["args"][1].rpartition("/")[2] for pod in pods_of([manifest])}


def test_a_worker_waits_until_its_leader_has_ended() -> None:
    """A group loses its pods all at once: ranks that ended first took the leader's last streams with them. One answer
    that did not come in time was taken for its end."""
    (worker,) = (pod for pod in pods_of(read(BY_NAME["nodes"])) if pod.role == "worker")
    command = worker.containers[0]["lifecycle"]["preStop"]["exec"]["command"]
    asked, numbers = threading.Event(), itertools.count()

    class Leader(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            number = next(numbers)
            self.send_response(503 if number % 6 in range(1, 5) else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()
            if self.path == "/v2/health/live" and number == 12:
                asked.set()

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Leader) as leader:
        threading.Thread(target=leader.serve_forever).start()
        here = [word.replace(":8000", f":{leader.server_port}").replace("sleep 2", "sleep 0.05") for word in command]
        waits = subprocess.Popen(here, env={**os.environ, "LWS_LEADER_ADDRESS": "127.0.0.1"}, stderr=subprocess.DEVNULL)
        try:
            assert asked.wait(30) and waits.poll() is None
        finally:
            leader.shutdown()
    assert waits.wait(30) == 0


def test_streams_get_the_same_time_to_end_everywhere() -> None:
    """One folder was changed, and its users' streams were cut off after thirty seconds."""
    found = {
        option(pod.containers[-1].get("args") or [], "--exit-timeout-secs") for f in FOLDERS for pod in pods_of(read(f))
    }
    assert found - {None} == {"120"}
