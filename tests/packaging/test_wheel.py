"""The built wheel is complete, takes no foreign name, and works without the checkout."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as a release is."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", out, root, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and with this one's packages but not the checkout."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=environment)
    # A folder named in a .pth is searched, but its own .pth files, among them the
    # one of the editable install, are not read.
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def test_top_level_is_the_package_alone(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in ZipFile(wheel).namelist()}
    assert {"bitsearch"} == {top for top in tops if not top.endswith(".dist-info")}
    assert len(tops) == 2


def test_wheel_holds_every_file_of_the_package(wheel: Path, package_files: list[Path]) -> None:
    held = {name for name in ZipFile(wheel).namelist() if name.startswith("bitsearch/")}
    expected = {path.as_posix() for path in package_files if path.name != "README.md"}
    assert {"bitsearch/py.typed"} <= expected
    assert held == expected


def test_wheel_carries_the_licence(wheel: Path) -> None:
    (name,) = (name for name in ZipFile(wheel).namelist() if name.endswith("licenses/LICENSE"))
    assert b"Apache License" in ZipFile(wheel).read(name)


def test_linked_folders_import_without_the_checkout(
    installed: Path, package_files: list[Path]
) -> None:
    # A folder without a module in it is not in the wheel.
    modules = {path.parts[1] for path in package_files if path.suffix == ".py"}
    linked = sorted({"kernels", "objectives"} & modules)
    script = (
        "import bitsearch, importlib, pkgutil\n"
        f"for folder in {[f'bitsearch.{name}' for name in linked]}:\n"
        "    package = importlib.import_module(folder)\n"
        "    for module in pkgutil.walk_packages(package.__path__, folder + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "    print(package.__path__[0])\n"
        "print(bitsearch.__file__)\n"
    )
    printed = run(installed / "bin" / "python", "-c", script, cwd=installed)
    places = [Path(line) for line in printed.splitlines()]
    assert len(places) == len(linked) + 1
    assert "objectives" in linked
    assert all(place.is_relative_to(installed) for place in places), places


def test_command_runs_without_the_checkout(installed: Path) -> None:
    assert "Usage" in run(installed / "bin" / "bitsearch", "--help", cwd=installed)


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; fails with its last lines if it fails."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, "\n".join((result.stdout + result.stderr).splitlines()[-20:])
    return result.stdout
