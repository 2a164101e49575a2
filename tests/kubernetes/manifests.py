"""What build/kubernetes holds, by folder, and the pods that would come of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path for path in (ROOT / "build" / "kubernetes").iterdir() if path.is_dir())
SET = "leaderworkerset.sigs.k8s.io/name"
WORKER = "leaderworkerset.sigs.k8s.io/worker-index"
Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PodOf:
    """A pod as a document's controller makes it. `labels`: with those that the controller adds."""

    owner: str
    role: str
    labels: dict[str, str]
    spec: dict[str, Any]

    @property
    def containers(self) -> list[dict[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def read(folder: Path) -> list[Document]:
    """All documents of a folder, without its Kustomization."""
    return [doc for path in sorted(folder.glob("*.yaml")) for doc in yaml.safe_load_all(path.read_text("utf-8"))]


def pods_of(documents: list[Document]) -> Iterator[PodOf]:
    """The pods that the documents ask for."""
    for document in documents:
        name = document["metadata"]["name"]
        if document["kind"] == "Pod":
            yield PodOf(owner=name, role="pod", labels=document["metadata"]["labels"], spec=document["spec"])
        elif document["kind"] == "Deployment":
            yield _pod(name, "pod", document["spec"]["template"], {})
        elif document["kind"] == "LeaderWorkerSet":
            template = document["spec"]["leaderWorkerTemplate"]
            for number, role in enumerate(("leader", "worker")):
                yield _pod(name, role, template[f"{role}Template"], {SET: name, WORKER: str(number)})


def _pod(owner: str, role: str, template: Document, added: dict[str, str]) -> PodOf:
    return PodOf(owner=owner, role=role, labels={**template["metadata"]["labels"], **added}, spec=template["spec"])


def number_of(quantity: object) -> float:
    """A Kubernetes quantity: 500m, 2Gi, 8."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m|Ki|Mi|Gi|Ti)?", str(quantity))
    assert found is not None, quantity
    return float(found[1]) * {None: 1, "m": 0.001, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[found[2]]


def option(arguments: list[str], name: str) -> str | None:
    """The value of `--name=value`."""
    return next((word.partition("=")[2] for word in arguments if word.startswith(f"{name}=")), None)
