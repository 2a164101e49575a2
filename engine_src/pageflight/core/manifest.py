"""EngineManifest: everything `pageflight build` tells the runtime, as one JSON file beside the engine's weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pageflight.core.errors import ManifestMismatch

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """One file of the engine directory: relative path, bytes, sha256 in hex."""

    path: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineManifest:
    """What build hands to runtime.

    `model` is `models.config.DecoderConfig` as plain JSON; `fingerprint` names what the engine was built for (versions,
    CPU architecture and features, GPU): the lowering compares it with the machine at load and refuses with the reason.
    `generation` holds defaults of sampling read from the checkpoint (temperature, top_k, top_p, …).
    """

    format_version: int = FORMAT_VERSION
    name: str
    family: str
    lowering: str  # torch | openvino | tensorrt
    dtype: str  # fp32 | fp16 | bf16 | fp8 | int8 | int4
    kv_dtype: str  # fp32 | fp16 | bf16 | fp8 | u8
    quant_group_size: int = 0  # 0: one scale per output channel
    block_size: int
    max_model_len: int
    vocab_size: int
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    add_bos: bool = False
    model: dict[str, Any]
    generation: dict[str, Any] = field(default_factory=dict)
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    fingerprint: dict[str, str]
    deterministic: bool = False  # verified at build: no company in a step changes what a sequence gets
    files: tuple[FileRecord, ...] = ()

    @property
    def title(self) -> str:
        """The engine in a few words, for errors."""
        return f"lowering {self.lowering}, dtype {self.dtype}, kv_dtype {self.kv_dtype}"

    def write(self, folder: Path) -> Path:
        """Write `manifest.json` into `folder`; keys in field order, so that two equal builds give equal bytes."""
        path = folder / MANIFEST_NAME
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def read(cls, folder: Path) -> EngineManifest:
        """Read the manifest of an engine directory. Raises ManifestMismatch when it is missing, foreign or damaged."""
        path = folder / MANIFEST_NAME
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ManifestMismatch(
                f"no engine in {folder}: {MANIFEST_NAME} is missing; run `pageflight build`"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ManifestMismatch(f"{path} is not valid JSON ({error}); build the engine again") from None
        version = data.get("format_version") if isinstance(data, dict) else None
        if version != FORMAT_VERSION:
            raise ManifestMismatch(
                f"{path}: format_version={version!r}, this runtime reads {FORMAT_VERSION}; build the engine again"
            )
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise ManifestMismatch(f"{path}: unknown entries {sorted(unknown)}; built by another version, build again")
        try:
            data["files"] = tuple(FileRecord(**item) for item in data.get("files", ()))
            data["eos_token_ids"] = tuple(data.get("eos_token_ids", ()))
            return cls(**data)
        except TypeError as error:
            raise ManifestMismatch(f"{path}: {error}; build the engine again") from None


def manifest_digest(folder: Path) -> str:
    """Of an engine directory's manifest, which has sizes and hashes of all its files; empty where there is none."""
    try:
        return hashlib.sha256((folder / MANIFEST_NAME).read_bytes()).hexdigest()
    except OSError:
        return ""
