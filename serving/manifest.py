"""The manifest of an adapter version: what it is, and where it came from."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from feedback.events import SCHEMA
from serving.peft_files import BadAdapter

MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """What a version is and where it came from. Its existence means that the version is whole."""

    model_config = ConfigDict(frozen=True, populate_by_name=True, extra="ignore")

    schema_: int = Field(default=SCHEMA, alias="schema")
    policy: str
    version: int
    parent: int
    """The version whose weights training began from; 0 is the base."""
    base: str
    """Fingerprint of the base it was made for."""
    files: dict[str, str]
    """sha256, in hex, of each file."""
    reward_model: str | None = None
    feedback: dict[str, JsonValue] = Field(default_factory=dict)
    """What it learned from: `count`, and `offsets` in the log."""
    update: dict[str, JsonValue] = Field(default_factory=dict)
    gate: dict[str, JsonValue] = Field(default_factory=dict)
    created: float
    """Seconds since the epoch."""
    imported_from: str | None = None


def read_manifest(text: bytes, policy: str, version: int) -> Manifest:
    """The manifest of this version of this policy. Raises BadAdapter when the text is not one, or is another's."""
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BadAdapter(f"v{version}: {MANIFEST} is no manifest ({where}: {first['msg']}).") from error
    if manifest.schema_ > SCHEMA:
        raise BadAdapter(
            f"v{version}: {MANIFEST} has schema {manifest.schema_}; this Heed reads up to {SCHEMA}. Upgrade Heed."
        )
    if (manifest.policy, manifest.version) != (policy, version):
        raise BadAdapter(
            f"v{version}: its manifest is of {manifest.policy}@v{manifest.version}: a folder was renamed or copied."
        )
    return manifest
