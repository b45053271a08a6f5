"""The adapter store: immutable versions of a policy in a folder, and the release that says which of them is served.

    <root>/<policy>/v000012/    adapter_model.safetensors  adapter_config.json  manifest.json  (report.html)
    <root>/<policy>/release.json

Publishing is one rename: a version is written beside its place, its manifest last, all of it synced, then renamed. So a
folder named v… with a manifest is whole, whatever was killed and when. Numbers only grow and are never used again.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from pydantic import JsonValue

from feedback.events import Release
from serving.base import Base, describe_base
from serving.durable import StoreBusy, locked, replace, sync_folder
from serving.lora import AdapterWeights
from serving.manifest import MANIFEST, Manifest, read_manifest
from serving.peft_files import CONFIG, FILES, WEIGHTS, BadAdapter, read_peft, read_peft_folder, save_peft
from serving.release import Action, By, ReleaseBroken, ReleaseFile, ReleaseRefused

__all__ = [
    "AdapterStore",
    "BadAdapter",
    "Base",
    "Manifest",
    "ReleaseBroken",
    "ReleaseRefused",
    "StoreBusy",
    "describe_base",
    "save_peft",
]

_VERSION = re.compile(r"v(\d{6,12})")
_ANY_NUMBER = re.compile(r"\.?v(\d{6,12})(\..*)?")
_SIZE_LIMIT = 4 << 30
PAGE = "report.html"
"""For people alone: nothing reads it, and no manifest lists it."""


class AdapterStore:
    """One policy's versions and release. Safe from any thread, and from any number of processes on one folder."""

    def __init__(self, root: Path, policy: str) -> None:
        self.policy = policy
        self.folder = root / policy
        self._release = ReleaseFile(self.folder, policy)

    # versions

    def publish(
        self,
        adapter: AdapterWeights | Path,
        *,
        parent: int,
        base: Base,
        reward_model: str | None = None,
        feedback: Mapping[str, JsonValue] | None = None,
        update: Mapping[str, JsonValue] | None = None,
        gate: Mapping[str, JsonValue] | None = None,
        imported_from: str | None = None,
        page: Callable[[int], str | None] = lambda version: None,
        above: int = 0,
    ) -> int:
        """Keep an adapter (weights, or a directory in PEFT's format) as the next version, and return its number.

        It is verified as a server would before anyone can see it; it is served to nobody until it is promoted. `page`: what
        people are to read of the version of this number, HTML or None, kept beside the manifest for its owner's eyes alone.
        `above`: the highest number known elsewhere, which a store restored from an older copy has forgotten.
        Raises BadAdapter, StoreBusy, and OSError (a full disk: nothing is left behind but a number never used).
        """
        with locked(self.folder / ".publish.lock"):
            self._sweep()
            version = self._take_number(above)
            draft = self.folder / f".v{version:06d}.{secrets.token_hex(4)}.tmp"
            draft.mkdir()
            try:
                self._write(draft, adapter, base)
                if (told := page(version)) is not None:
                    replace(draft / PAGE, told.encode(), mode=0o600)
                manifest = Manifest(
                    policy=self.policy,
                    version=version,
                    parent=parent,
                    base=base.fingerprint,
                    files={name: hashlib.sha256((draft / name).read_bytes()).hexdigest() for name in FILES},
                    reward_model=reward_model,
                    feedback=dict(feedback or {}),
                    update=dict(update or {}),
                    gate=dict(gate or {}),
                    created=time.time(),
                    imported_from=imported_from,
                )
                replace(draft / MANIFEST, manifest.model_dump_json(by_alias=True, indent=1).encode() + b"\n")
                draft.rename(self._place(version))
            finally:
                shutil.rmtree(draft, ignore_errors=True)
            sync_folder(self.folder)
            return version

    def import_adapter(self, folder: Path, base: Base) -> int:
        """Make a PEFT adapter from elsewhere the next version: verified, not gated, served to nobody until promoted.

        Raises BadAdapter, StoreBusy, OSError.
        """
        return self.publish(folder, parent=0, base=base, imported_from=str(folder.resolve()))

    def versions(self) -> list[int]:
        """Every whole version, oldest first."""
        found = (_VERSION.fullmatch(path.name) for path in self._entries())
        return sorted(int(match[1]) for match in found if match and (self.folder / match[0] / MANIFEST).is_file())

    def page(self, version: int) -> Path:
        """Where the version's page lies, if it came with one."""
        return self._place(version) / PAGE

    def manifest(self, version: int) -> Manifest:
        """Raises BadAdapter when there is no such version, or its manifest is not one."""
        name = f"v{version}"
        place = self._place(version)
        try:
            text = self._read(name, place / MANIFEST)
        except FileNotFoundError:
            known = ", ".join(f"v{known}" for known in self.versions()[-20:]) or "none"
            raise BadAdapter(f"{name}: no such version of policy {self.policy}; the store holds: {known}.") from None
        return read_manifest(text, self.policy, version)

    def load(self, version: int, base: Base | None) -> AdapterWeights:
        """Read a version, having verified it: names, digests, base, kind, rank, targets, shapes, finiteness.

        The bytes that were verified are the bytes that are used. Without a `base`, what depends on it is not checked.
        Raises BadAdapter.
        """
        name = f"v{version}"
        manifest = self.manifest(version)
        if base is not None and manifest.base != base.fingerprint:
            raise BadAdapter(
                f"{name}: made for another base, tokenizer or chat template ({manifest.base[:12]}…, not "
                f"{base.fingerprint[:12]}…). Serve it with that base, or learn anew on this one."
            )
        if sorted(manifest.files) != sorted(FILES):
            raise BadAdapter(f"{name}: its manifest lists {sorted(manifest.files)}; expected {sorted(FILES)}.")
        content: dict[str, bytes] = {}
        for file, digest in manifest.files.items():
            try:
                content[file] = self._read(name, self._place(version) / file)
            except FileNotFoundError:
                raise BadAdapter(f"{name}: {file} is missing.") from None
            if hashlib.sha256(content[file]).hexdigest() != digest:
                raise BadAdapter(f"{name}: {file} has another digest than its manifest says: it was changed or torn.")
        return read_peft(name, content[CONFIG], content[WEIGHTS], base)

    def verify(self, version: int, base: Base | None) -> None:
        """Raises BadAdapter when the version could not be served on this base."""
        self.load(version, base)

    def stamp(self, version: int) -> tuple[tuple[int, int] | None, ...]:
        """Changes when a version's files are replaced: what a reader that found them bad waits for."""
        return tuple(_stamp(self._place(version) / name) for name in (*FILES, MANIFEST))

    def prune(self, keep: int = 20, loaded: Collection[int] = ()) -> list[int]:
        """Delete old versions and return them; current, last good, candidate, `loaded` and the newest `keep` stay."""
        with locked(self.folder / ".release.lock"):
            release = self._release.read_strictly()
            spared = {release.current, release.last_good, release.candidate, *loaded}
            versions = self.versions()
            doomed = [version for version in versions[: max(0, len(versions) - keep)] if version not in spared]
            for version in doomed:
                # renamed first, so that nobody reads a version half deleted
                grave = self.folder / f".v{version:06d}.{secrets.token_hex(4)}.tmp"
                self._place(version).rename(grave)
                shutil.rmtree(grave)
            return doomed

    # release

    def release(self) -> Release:
        """What is served now. Cheap enough to poll; it never fails.

        While the file is broken (`release_problem` says how), it is the last good one that this process read, else the
        one that serves the base.
        """
        return self._release.read()

    @property
    def release_problem(self) -> str | None:
        """What is wrong with the release file now, or None."""
        return self._release.broken

    def change(
        self,
        action: Action,
        by: By,
        *,
        version: int | None = None,
        reason: str = "",
        base: Base | None = None,
        expected: int | None = None,
    ) -> Release:
        """Promote a version (0: the base), roll back to the last good one, pause or resume; return the new release.

        `candidate` approves a version without serving it, `withdraw` takes it back out of sight.

        A promoted version is verified first (against `base`, when given) and approved from then on. `expected` is the
        generation that the caller decided on, if it matters. Raises BadAdapter, ReleaseRefused, ReleaseBroken,
        StoreBusy or OSError; the release is then as it was.
        """
        if action in ("promote", "candidate") and version:
            self.verify(version, base)
        return self._release.change(
            action, by, version=version, reason=reason, exists=self._is_whole, expected=expected
        )

    # files

    def _place(self, version: int) -> Path:
        return self.folder / f"v{version:06d}"

    def _is_whole(self, version: int) -> bool:
        return (self._place(version) / MANIFEST).is_file()

    def _entries(self) -> list[Path]:
        return list(self.folder.iterdir()) if self.folder.is_dir() else []

    def _read(self, name: str, path: Path) -> bytes:
        """The bytes of a plain file of the store. Raises FileNotFoundError, BadAdapter when it leads elsewhere."""
        if path.is_symlink() or path.parent.is_symlink():
            raise BadAdapter(f"{name}: {path.name} is a link; a version's files lie in the store itself.")
        if path.stat().st_size > _SIZE_LIMIT:
            raise BadAdapter(f"{name}: {path.name} is larger than {_SIZE_LIMIT >> 30} GiB, the most that is read.")
        try:
            return path.read_bytes()
        except IsADirectoryError:
            raise BadAdapter(f"{name}: {path.name} is a directory.") from None

    def _write(self, draft: Path, adapter: AdapterWeights | Path, base: Base) -> None:
        """Put the two files of an adapter into `draft`, verified and synced."""
        if isinstance(adapter, Path):
            config, weights = read_peft_folder(str(adapter), adapter)
            (draft / CONFIG).write_bytes(config)
            (draft / WEIGHTS).write_bytes(weights)
            name = str(adapter)
        else:
            save_peft(draft, adapter, base.name, fan_in_fan_out=base.fan_in_fan_out)
            name = "the new adapter"
        read_peft(name, (draft / CONFIG).read_bytes(), (draft / WEIGHTS).read_bytes(), base)
        for file in FILES:
            with (draft / file).open("rb") as handle:
                os.fsync(handle.fileno())

    def _take_number(self, above: int) -> int:
        """The next version number: one above every number ever seen, and `above`. The caller holds the publish lock.

        It is written down before it is used, so that neither a crash nor a deletion can bring it back.
        """
        mark = self.folder / ".highest"
        noted = mark.read_text().strip() if mark.is_file() else ""
        named = (_ANY_NUMBER.fullmatch(path.name) for path in self._entries())
        seen = [int(match[1]) for match in named if match] + self._released()
        version = max(int(noted) if noted.isdecimal() else 0, *seen, above) + 1
        replace(mark, f"{version}\n".encode())
        return version

    def _released(self) -> list[int]:
        """Every number that the release or its history names."""
        release = self.release()
        named = [release.current, release.last_good, release.candidate or 0, *release.approved]
        return named + [change.current for change in release.changes]

    def _sweep(self) -> None:
        """Delete what a killed publisher left behind. The caller holds the publish lock, so nobody is writing."""
        for path in self._entries():
            if path.name.startswith(".v") and path.name.endswith(".tmp"):
                shutil.rmtree(path, ignore_errors=True)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns
