"""What a repository remembers about its own making: which models, from what, with which options.

One JSON file in the repository's root. It answers three questions of the next build: is anything to be done, is this
repository ours to change, and was a generated file edited by hand meanwhile.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from pageflight.core.errors import ConfigError
from pageflight_build.instances import FIRST_FOLDER
from pageflight_build.options import ServingOptions

RECORD_NAME = "pageflight.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRecord:
    """Where an engine lies in its model's folder, and the digest of its inputs: equal ones need no new build. `engine`:
    what it was lowered to; empty in records that are older than this field."""

    folder: str
    inputs: str
    engine: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """One checkpoint of the repository. `engines`: of its instances in their order, one where all are alike."""

    name: str
    checkpoint: str
    engines: tuple[EngineRecord, ...]
    serving: ServingOptions
    default: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryRecord:
    """All models, and the sha256 of every generated text file by its path in the repository."""

    models: tuple[ModelRecord, ...] = ()
    generated: dict[str, str]

    def model(self, name: str) -> ModelRecord | None:
        return next((model for model in self.models if model.name == name), None)

    def with_model(self, model: ModelRecord) -> tuple[ModelRecord, ...]:
        """The models after adding or replacing `model`, with exactly one default among them."""
        merged = [model if existing.name == model.name else existing for existing in self.models]
        if self.model(model.name) is None:
            merged.append(model)
        owner = model.name
        if not model.default:
            owner = next((existing.name for existing in self.models if existing.default), model.name)
        return tuple(replace(item, default=item.name == owner) for item in merged)

    def write(self, root: Path) -> None:
        data = {"format_version": FORMAT_VERSION, **asdict(self)}
        (root / RECORD_NAME).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, root: Path) -> RepositoryRecord | None:
        """The record of the repository at `root`; None where there is none. Raises ConfigError for a damaged one."""
        path = root / RECORD_NAME
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.pop("format_version") != FORMAT_VERSION:
                raise ConfigError(f"{path} was written by another version; build with --force to replace {root}")
            return cls(models=tuple(_model(item) for item in data["models"]), generated=dict(data["generated"]))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is damaged ({error!r}); build with --force to replace {root}") from None

    def edited_files(self, root: Path) -> list[str]:
        """Generated files whose content is not what was generated: someone edited or removed them."""
        return [name for name, digest in self.generated.items() if file_digest(root / name) != digest]


def file_digest(path: Path) -> str:
    """sha256 of a small file in hex; empty where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _model(data: dict[str, Any]) -> ModelRecord:
    known = {field.name for field in fields(ServingOptions)}
    given = {name: value for name, value in data["serving"].items() if name in known}
    if "instances" in given:
        given["instances"] = str(given["instances"])  # once a number
    engines = tuple(EngineRecord(**engine) for engine in data["engines"]) if "engines" in data else _one_engine(data)
    return ModelRecord(
        name=data["name"],
        checkpoint=data["checkpoint"],
        engines=engines,
        serving=ServingOptions(**given),
        default=data["default"],
    )


def _one_engine(data: dict[str, Any]) -> tuple[EngineRecord, ...]:
    """Of a record written when all instances of a model had the same engine."""
    return (EngineRecord(folder=FIRST_FOLDER, inputs=data["engine_inputs"]),)
