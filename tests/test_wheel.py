"""The wheel: exactly the four packages and the `heed` command, enough to run on its own, and made from the sdist alike."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_layout import ROOMS, ROOT, imports, modules, project_files
from tests.test_up import first_words, is_gone, running

INFO = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def build(source: Path, out: Path) -> None:
    """Make the sdist and the wheel of this source tree."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", out], cwd=source, check=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the checkout's sdist and wheel."""
    out = tmp_path_factory.mktemp("made")
    build(ROOT, out)
    return out


@pytest.fixture(scope="module")
def wheel(made: Path) -> Path:
    [wheel] = made.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_it_holds_the_four_packages_and_nothing_else(wheel: Path):
    files = contents(wheel)
    info = {name for name in files if ".dist-info/" in name}
    assert {name.split(".dist-info/")[1] for name in info} == INFO
    packages = {str(path): (ROOT / path).read_bytes() for path in project_files() if path.parts[0] in ROOMS}
    assert {name: text for name, text in files.items() if name not in info} == packages
    for needed in ("serving/step.c", "serving/tiny/model.safetensors", "serving/static/index.html", "learner/page.css"):
        assert needed in files


def test_its_only_command_is_heed(wheel: Path):
    [text] = [text for name, text in contents(wheel).items() if name.endswith("entry_points.txt")]
    entries = ConfigParser()
    entries.read_string(text.decode())
    assert {name: dict(entries[name]) for name in entries.sections()} == {
        "console_scripts": {"heed": "deploy.cli:main"}
    }


def test_the_sdist_makes_the_same_wheel(made: Path, wheel: Path, tmp_path: Path):
    [sdist] = made.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    [source] = (tmp_path / "source").iterdir()
    assert {path.name for path in source.iterdir()} == {
        *ROOMS,
        *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "PKG-INFO", ".gitignore"),
    }
    build(source, tmp_path / "again")
    assert contents(tmp_path / "again" / wheel.name) == contents(wheel)


def needed_by(requirement: Requirement, seen: set[str]) -> Iterator[str]:
    """The names of a requirement and of all that it brings along."""
    name = canonicalize_name(requirement.name)
    if name in seen:
        return
    seen.add(name)
    yield name
    try:
        lines = requires(name) or []
    except PackageNotFoundError:  # not installed: for another platform
        return
    for further in map(Requirement, lines):
        extras = requirement.extras or {""}
        if further.marker is None or any(further.marker.evaluate({"extra": extra}) for extra in extras):
            yield from needed_by(further, seen)


def test_what_the_packages_import_comes_with_the_wheel_or_one_of_its_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "test" for line in lines]
    seen: set[str] = set()
    brought = {name for line in [*project["dependencies"], *extras] for name in needed_by(Requirement(line), seen)}
    imported = {name.split(".")[0] for path in modules(*ROOMS) for name in imports(path)}
    known = packages_distributions()
    assert {"torch", "fastapi"} <= imported
    for name in imported - set(sys.stdlib_module_names) - set(ROOMS):
        assert {canonicalize_name(one) for one in known[name]} & brought, f"nothing that Heed depends on brings {name}"


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel alone; its dependencies are those of the tests, so that none are fetched."""
    made = tmp_path_factory.mktemp("fresh") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made], check=True)
    python = made / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--quiet", "install", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(made)}))
    lent = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # only their folders: the .pth file there, which leads to this checkout, is not read in this way
    (site / "lent.pth").write_text("\n".join(lent), "utf-8")
    return made


def test_a_fresh_environment_with_the_wheel_alone_runs_heed_up(environment: Path, tmp_path: Path):
    heed, python = environment / "bin" / "heed", environment / "bin" / "python"
    asked = f"import {', '.join(ROOMS)}; print(*[m.__file__ for m in ({', '.join(ROOMS)})], sep='\\n')"
    told = subprocess.run([python, "-c", asked], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [Path(line).is_relative_to(environment) for line in told.stdout.splitlines()] == [True] * len(ROOMS)
    with running(tmp_path, heed=[heed]) as up:
        assert first_words(up.url)
        children = up.children()
        assert set(children) == {"serve", "learn"}
        for pid in children.values():
            assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(os.fsencode(python))
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(60) == 0
        assert all(is_gone(pid) for pid in children.values())
        assert "Traceback" not in up.text
