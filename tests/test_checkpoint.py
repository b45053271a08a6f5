"""Checkpoints: whole or not there, the last two kept, torn ones passed over."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from learner import checkpoint
from serving.base import Base

META = {"base": "b", "offsets": {"heed.feedback": 7}, "trainer": {"beta": 0.05}}


def tensors(number: int) -> dict[str, torch.Tensor]:
    return {"value.down.0": torch.full((2, 3), float(number)), "steps": torch.tensor(number)}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_loaded_is_what_was_saved(tmp_path: Path):
    shared = torch.arange(6.0)
    checkpoint.save(tmp_path, 1, {"a": shared, "b": shared.view(2, 3), "c": shared[::2]}, META)
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found.meta == META
    assert torch.equal(found.tensors["b"], torch.arange(6.0).view(2, 3))
    assert torch.equal(found.tensors["c"], torch.tensor([0.0, 2.0, 4.0]))
    assert found.tensors["a"].dtype == torch.float32


def test_there_is_none_at_first(tmp_path: Path):
    assert checkpoint.load(tmp_path) is None
    assert checkpoint.load(tmp_path / "not there") is None


def test_the_newest_is_loaded_and_the_last_two_are_kept(tmp_path: Path):
    for number in (1, 2, 10, 1_000_000):
        checkpoint.save(tmp_path, number, tensors(number), META)
    assert names(tmp_path) == {"000010", "1000000"}
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found.tensors["steps"].item() == 1_000_000


def test_the_same_number_again_replaces_it(tmp_path: Path):
    checkpoint.save(tmp_path, 1, tensors(1), META)
    checkpoint.save(tmp_path, 1, tensors(5), META)
    assert names(tmp_path) == {"000001"}
    found = checkpoint.load(tmp_path)
    assert found is not None
    assert found.tensors["steps"].item() == 5


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tensors.safetensors", b""),
        ("tensors.safetensors", b"\x08\0\0\0\0\0\0\0{}      changed"),
        ("checkpoint.json", b""),
        ("checkpoint.json", b"[]"),
        ("checkpoint.json", b'{"sha256": "0"}'),
        ("checkpoint.json", None),
        ("tensors.safetensors", None),
    ],
)
def test_a_torn_one_is_passed_over_for_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, content: bytes | None
):
    checkpoint.save(tmp_path, 1, tensors(1), META)
    place = checkpoint.save(tmp_path, 2, tensors(2), META)
    if content is None:
        (place / file).unlink()
    else:
        (place / file).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = checkpoint.load(tmp_path)
    assert found is not None
    assert found.tensors["steps"].item() == 1
    assert "000002 is torn" in caplog.text


@pytest.mark.parametrize("error", [KeyError, ValueError, RuntimeError, TypeError, AttributeError])
def test_one_of_another_heed_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, error: type[Exception]):
    class Strict:
        base = Base("b", {})

        def state(self) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
            return tensors(1), {}

        def restore(self, *_: object) -> None:
            raise error("no such field")

    kept = checkpoint.Checkpoints(tmp_path, Strict())
    kept.save(1, {})
    kept.restore()
    assert "the checkpoint does not fit" in caplog.text


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint.save(tmp_path, 1, tensors(1), META)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, tensors(2), META)
    assert names(tmp_path) == {"000001"}


FATAL = ("fsync 1", "fsync 2", "rename 1", "fsync 3")


def test_a_kill_at_any_step_leaves_a_whole_one_and_the_next_save_sweeps(tmp_path: Path):
    """kill -9 for real, right after each call that touches the disk."""
    for fatal in FATAL:
        checkpoint.save(tmp_path / fatal, 1, tensors(1), META)
    program = f"""
import os, pathlib, signal
from learner import checkpoint
from tests.test_checkpoint import FATAL, META, tensors

def deadly(name, real, count):
    calls = []
    def call(*arguments):
        result = real(*arguments)
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

for fatal in FATAL:
    child = os.fork()
    if child == 0:
        call, count = fatal.split()
        owner = os if call == "fsync" else pathlib.Path
        setattr(owner, call, deadly(call, getattr(owner, call), int(count)))
        checkpoint.save(pathlib.Path({str(tmp_path)!r}) / fatal, 2, tensors(2), META)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -9, fatal
"""
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True)
    steps = {}
    for fatal in FATAL:
        found = checkpoint.load(tmp_path / fatal)
        assert found is not None
        steps[fatal] = found.tensors["steps"].item()
        checkpoint.save(tmp_path / fatal, 3, tensors(3), META)
        assert not [name for name in names(tmp_path / fatal) if name.endswith(".tmp")]
    assert steps == {"fsync 1": 1, "fsync 2": 1, "rename 1": 2, "fsync 3": 2}
