"""The schemas of manifests: the API's own for what is built in, ours for a LeaderWorkerSet, which is not."""

from __future__ import annotations

from typing import Any

import jsonschema
import kubernetes_validate
from manifests import Document

VERSIONS = ("1.30", "1.37")
"""The oldest release that the manifests are for, and the newest that there are schemas of."""


def _object(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


_COUNT = {"type": "integer", "minimum": 0}
_SHARE = {"oneOf": [_COUNT, {"type": "string", "pattern": "^[0-9]+%$"}]}
_TEMPLATE = {"type": "object"}  # looked at as a pod
LEADER_WORKER_SET = _object(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "leaderworkerset.x-k8s.io/v1"},
    kind={"const": "LeaderWorkerSet"},
    metadata={"type": "object", "required": ["name"]},
    spec=_object(
        ("leaderWorkerTemplate",),
        replicas=_COUNT,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        networkConfig=_object(("subdomainPolicy",), subdomainPolicy={"enum": ["Shared", "UniquePerReplica"]}),
        rolloutStrategy=_object(
            ("type",),
            type={"const": "RollingUpdate"},
            rollingUpdateConfiguration=_object(partition=_COUNT, maxUnavailable=_SHARE, maxSurge=_SHARE),
        ),
        leaderWorkerTemplate=_object(
            ("workerTemplate",),
            size={"type": "integer", "minimum": 1},
            restartPolicy={"enum": ["Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]},
            leaderTemplate=_TEMPLATE,
            workerTemplate=_TEMPLATE,
        ),
    ),
)
"""The fields of the LeaderWorkerSet API, v1, that our manifests use."""


def check(document: Document) -> None:
    """Raises jsonschema.ValidationError, of which kubernetes_validate's is one."""
    if document["kind"] != "LeaderWorkerSet":
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
        return
    jsonschema.validate(document, LEADER_WORKER_SET)
    template = document["spec"]["leaderWorkerTemplate"]
    for role in ("leaderTemplate", "workerTemplate"):
        if role in template:
            check({"apiVersion": "v1", "kind": "Pod", **template[role]})
