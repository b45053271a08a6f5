"""What computes: versions, device, the base model's files, and the adapters that are to fit it. No weights are loaded."""

from __future__ import annotations

import platform
import re
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from deploy import known
from deploy.door import NotDone
from deploy.finding import Finding, Seen, Verdict
from learner.config import LearnerConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from serving.adapters import Base

NEWEST = 3
"""Of the versions that nobody is served, so many are looked at; `heed adapters verify` looks at all."""
DRIVER = Path("/proc/driver/nvidia/version")


def device(seen: Seen) -> Iterator[Finding]:
    packages = ", ".join(f"{name} {_installed(name)}" for name in ("torch", "transformers", "peft"))
    own = f"Heed {_installed('heed')}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {packages}"
    yield Finding("versions", "ok", f"{own} on {platform.system()} {platform.machine()}")
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sees = torch.cuda.is_available()
    why = " ".join(str(warning.message).splitlines()[0] for warning in caught)
    driver = re.search(r"\d+\.\d+[\d.]*", DRIVER.read_text()) if DRIVER.exists() else None
    wanted = seen.config.serving.device
    if sees and wanted != "cpu":
        yield from _gpus(wanted)
    else:
        yield without_gpu(wanted, torch.version.cuda, driver and driver[0], why)


def _gpus(wanted: str) -> Iterator[Finding]:
    import torch

    index = int(wanted.partition(":")[2] or 0)
    count = torch.cuda.device_count()
    if index >= count:
        yield Finding("device", "fail", f"{wanted} is not here: there are {count} GPUs", "Set HEED_DEVICE to another.")
        return
    free, total = torch.cuda.mem_get_info(index)
    name = torch.cuda.get_device_name(index)
    says = f"cuda:{index}, {name}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free (torch for CUDA {torch.version.cuda})"
    yield Finding("device", "ok", says)


def without_gpu(wanted: str, built_for: str | None, driver: str | None, why: str) -> Finding:
    """What is said where no GPU is used.

    `wanted`: HEED_DEVICE; `built_for`: the CUDA that torch was built for; `driver`: NVIDIA's, where there is one; `why`:
    what torch said when it looked.
    """
    from serving.cores import cores

    cpu = f"cpu, {cores()} cores, {_memory_free() / 2**30:.1f} GiB of memory free"
    if wanted in ("cpu", "mps"):
        return Finding("device", "ok", cpu if wanted == "cpu" else wanted)
    verdict: Verdict = "warn" if wanted == "auto" else "fail"
    if driver and built_for is None:
        do = "Install a torch that is built for CUDA, or set HEED_DEVICE=cpu."
        return Finding("device", verdict, f"a GPU is here (driver {driver}), and this torch is for CPUs alone", do)
    if driver:
        do = "Bring them together: a newer driver, or a torch for an older CUDA. In a container: give it the GPU (--gpus all)."
        says = f"torch for CUDA {built_for} cannot use the GPU (driver {driver})"
        return Finding("device", verdict, says + (f": {why}" if why else ""), do)
    if wanted == "auto":
        return Finding("device", "ok", cpu)
    do = "Set HEED_DEVICE=auto, install NVIDIA's driver, or, in a container, give it the GPU (--gpus all)."
    return Finding("device", "fail", f"HEED_DEVICE={wanted}, and no NVIDIA driver is here", do)


def _memory_free() -> float:
    """Bytes that a new process may take, by the machine and by the container; infinite where nobody says."""
    free = float("inf")
    meminfo, limit, used = (
        Path(path) for path in ("/proc/meminfo", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
    )
    if meminfo.exists() and (found := re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text())):
        free = int(found[1]) * 1024.0
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        free = min(free, float(most) - float(used.read_text()))
    return free


def model(seen: Seen) -> Iterator[Finding]:
    """The base's files, whole and of one build; then the adapters, and on which base server and learner are."""
    config = seen.config
    from serving.base import describe_base
    from serving.model import load_chat

    named = config.serving.model
    folder = _folder(named)
    if folder is None:
        do = "The first start fetches it. On a machine that cannot: copy its directory, and name that."
        yield Finding("model", "warn", f"{named} is no directory here, and was never fetched", do)
        return
    _, chat, _ = load_chat(folder)
    empty, size = _without_weights(folder)
    says = f"{named or 'the built-in heed-tiny'}: {empty.num_parameters() / 1e6:,.1f} M parameters, {size / 2**20:,.0f} MiB"
    if not seen.ready and size > _memory_free():
        do = "Stop what fills it, or take a smaller model."
        yield Finding(
            "model", "fail", f"{says}, more than the {_memory_free() / 2**20:,.0f} MiB of memory that are free", do
        )
    else:
        yield Finding("model", "ok", f"{says}, whole")
    base = describe_base(empty, chat, folder)
    yield from _bases(seen, base.fingerprint)
    yield from _adapters(config, base)


def _folder(named: str | None) -> Path | None:
    """The base's directory, without fetching anything; None for one of the hub that was not fetched. Raises ModelError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from serving.model import BUILT_IN, find_model

    if named in (None, BUILT_IN) or Path(named).expanduser().is_dir():
        return find_model(named)
    try:
        return find_model(snapshot_download(named, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError:
        return find_model(named)  # which says what is wrong with the name


def _without_weights(folder: Path) -> tuple[PreTrainedModel, int]:
    """The base with its shapes alone, which the files' tensors have, and the bytes of those. Raises ModelError."""
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    from serving.model import ModelError

    try:
        with torch.device("meta"):
            empty: PreTrainedModel = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(str(folder), local_files_only=True)
            )
    except Exception as error:  # as in serving.model.load_model
        raise ModelError(f"model {str(folder)!r} cannot be built: {str(error).splitlines()[0]}") from error
    shapes = {name: list(tensor.shape) for name, tensor in empty.state_dict().items()}
    size, met = 0, False
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    met = met or name in shapes
                    if (shape := list(file.get_slice(name).get_shape())) != shapes.get(name, shape):
                        raise ModelError(f"{path}: {name} has the shape {shape}, and config.json says {shapes[name]}.")
        except SafetensorError as error:
            raise ModelError(f"{path} is not whole: {error}. Fetch or copy it again.") from error
    if not met:
        raise ModelError(f"no tensor of {folder} is one of the model that its config.json names.")
    return empty, size


def _bases(seen: Seen, here: str) -> Iterator[Finding]:
    """Whether the server that spoke last, and the learner, have this base."""
    config, others = seen.config, dict[str, str]()
    if seen.newest is not None:
        others["the server that spoke last"] = seen.newest.base
    if known.state_path(config).exists():
        with suppress(NotDone), known.reading(config) as db:  # where it cannot be read, that was said of the reading
            for (base,) in db.execute(
                "SELECT base FROM learned_by WHERE policy = ?", (config.serving.feedback.policy,)
            ):
                others["the learner"] = base
    do = "Give both the same model (HEED_MODEL), tokenizer and template. Versions fit their own base alone."
    for who, base in others.items():
        if base != here:
            yield Finding("base", "warn", f"{who} has another base, {base[:12]}…, than is set here, {here[:12]}…", do)
    if set(others.values()) == {here}:
        yield Finding("base", "ok", f"{' and '.join(others)}: the same as here, {here[:12]}…")


def _adapters(config: LearnerConfig, base: Base) -> Iterator[Finding]:
    """The versions in use and the newest, as a server would look at them."""
    from deploy.versions import store_of, verify

    store = store_of(config)
    if store.release_problem:
        do = "Promote a version by hand: heed adapters promote V."
        yield Finding("release", "fail", store.release_problem, do)
    release, there = store.release(), store.versions()
    used = {release.current, release.last_good, release.candidate or 0, *there[-NEWEST:]} - {0}
    problems = verify(store, sorted(used), base)
    for problem in filter(None, problems.values()):
        yield Finding("adapters", "fail", problem, "It is never served. Restore it from a copy, or delete its folder.")
    if not any(problems.values()):
        says = f"{len(there)} versions, those in use and the newest whole; v{release.current} is served"
        yield Finding("adapters", "ok", says)


def _installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"
