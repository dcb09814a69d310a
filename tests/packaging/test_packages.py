"""The three ways to install pvfio: sdist, wheel (built from that sdist) and editable.

Each is built from a copy of this tree with the environment's own setuptools and cffi, so no network is needed, and
tried in an interpreter that sees the result and third-party packages, but no other pvfio.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = (".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
PACKAGE_DATA = {".py", ".pyi", ".h", ".typed"}

PRELUDE = """
import json, site, sys
site.addsitedir(sys.argv[1])
sys.path += sys.argv[2:]
"""
IMPORT_ALL = """
import pvfio, pvfio.drivers, pvfio.devices, pvfio.errors, pvfio._native
from pvfio.abi import dtype_of, ffi, lib
assert dtype_of("uint32_t").itemsize == ffi.sizeof("uint32_t") == 4
modules = (pvfio, pvfio.drivers, pvfio.devices, pvfio._native)
print(json.dumps([module.__file__ for module in modules]))
"""
IMPORT_BARE = """
for name in ("drivers", "devices"):
    try:
        __import__(name)
    except ImportError as error:
        print(type(error).__name__, error)
    else:
        raise SystemExit(f"{name} was imported")
"""


def run(*command: object, cwd: Path) -> str:
    """Run a command to its end; its standard output, or a failure with all it said."""
    # Sanitizers and search paths of this run are not part of what a build or an install sees.
    dropped = ("LD_PRELOAD", "PYTHONPATH", "PVFIO_SANITIZE", "PVFIO_WERROR")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"{command}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


def copy_of_the_tree(target: Path) -> Path:
    """The sources alone, links kept as links, as a clone has them."""
    shutil.copytree(ROOT, target, symlinks=True, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    return target


def package_files(root: Path, suffixes: set[str]) -> set[str]:
    """Names relative to ``root`` of the package's files of these kinds, links to folders followed."""
    found = (
        Path(folder, name).relative_to(root)
        for folder, _, names in os.walk(root / "pvfio", followlinks=True)
        for name in names
    )
    return {str(path) for path in found if path.suffix in suffixes and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def third_party(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that is installed here, but pvfio."""
    cffi = find_spec("_cffi_backend")
    assert cffi is not None
    assert cffi.origin is not None
    folder = tmp_path_factory.mktemp("third-party")
    for path in Path(cffi.origin).parent.iterdir():
        if "pvfio" not in path.name and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(sdist, wheel); the wheel is built from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("built")
    tree = copy_of_the_tree(folder / "tree")
    run(sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", folder / "dist", tree, cwd=folder)
    [sdist] = (folder / "dist").glob("*.tar.gz")
    [wheel] = (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder the wheel was installed into."""
    target = tmp_path_factory.mktemp("installed") / "site"
    options = ("--no-deps", "--no-index", "--quiet", "--no-compile", "--target", target)
    run(sys.executable, "-m", "pip", "install", *options, built[1], cwd=target.parent)
    return target


def isolated(code: str, site: Path, *more: Path, cwd: Path) -> str:
    """Run code in an interpreter whose only site directory is ``site``, with ``more`` behind it."""
    return run(sys.executable, "-I", "-S", "-c", PRELUDE + code, site, *more, cwd=cwd)


def imported_files(output: str) -> list[Path]:
    files: list[Any] = json.loads(output.splitlines()[-1])
    return [Path(file) for file in files]


def test_the_sdist_holds_every_source_as_a_real_file(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        members = archive.getmembers()
    names = {member.name.partition("/")[2] for member in members}
    assert all(member.isfile() or member.isdir() for member in members)
    assert package_files(ROOT, PACKAGE_DATA | {".c"}) - {"pvfio/_native.c"} <= names
    assert {"pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE"} <= names
    assert "tests/packaging/test_packages.py" in names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or name == "pvfio/_native.c"]


def test_the_wheel_fits_every_python_from_3_11(built: tuple[Path, Path]) -> None:
    assert built[1].name.endswith("-cp311-abi3-linux_x86_64.whl")
    with zipfile.ZipFile(built[1]) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        header = message_from_string(archive.read(name).decode())
    assert header["Root-Is-Purelib"] == "false"
    assert header.get_all("Tag") == ["cp311-abi3-linux_x86_64"]


def test_the_wheel_holds_the_package_and_no_c(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        members = archive.infolist()
    names = {member.filename for member in members}
    assert package_files(ROOT, PACKAGE_DATA) <= names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"pvfio"}
    assert [name for name in names if name.endswith(".so")] == ["pvfio/_native.abi3.so"]
    assert not [name for name in names if name.endswith((".c", ".o", ".pyc"))]
    file_types = {member.external_attr >> 28 for member in members}
    assert file_types == {0o10}, "only regular files"


def test_the_wheel_names_its_command_its_licence_and_its_needs(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        texts = {
            name.rpartition("/")[2]: archive.read(name).decode()
            for name in archive.namelist()
            if ".dist-info/" in name
        }
    metadata = message_from_string(texts["METADATA"])
    assert "pvfio = pvfio.cli:main" in texts["entry_points.txt"].splitlines()
    assert texts["top_level.txt"].split() == ["pvfio"]
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    needs = metadata.get_all("Requires-Dist") or []
    core = {need.split(">=")[0] for need in needs if "extra ==" not in need}
    assert core == {"trio", "cffi", "numpy", "typer", "rich"}
    assert {"test", "dev"} <= set(metadata.get_all("Provides-Extra") or [])


def test_the_installed_wheel_imports(installed: Path, third_party: Path, tmp_path: Path) -> None:
    for file in imported_files(isolated(IMPORT_ALL, installed, third_party, cwd=tmp_path)):
        assert file.is_relative_to(installed / "pvfio")
        assert not file.is_symlink()


def test_bare_names_are_refused(installed: Path, third_party: Path, tmp_path: Path) -> None:
    absent = isolated(IMPORT_BARE, installed, third_party, cwd=tmp_path)
    assert absent.splitlines() == [
        "ModuleNotFoundError No module named 'drivers'",
        "ModuleNotFoundError No module named 'devices'",
    ]
    # Found all the same, by someone whose search path leads there (as the root of a clone does).
    for folder in (installed / "pvfio", (ROOT / "pvfio" / "drivers").resolve().parent):
        refused = isolated(IMPORT_BARE, installed, folder, third_party, cwd=tmp_path)
        assert refused.splitlines() == [
            "ImportError import pvfio.drivers, not drivers: this folder is the package pvfio.drivers",
            "ImportError import pvfio.devices, not devices: this folder is the package pvfio.devices",
        ]


def test_an_editable_install_follows_the_tree(third_party: Path, tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path / "tree")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", tmp_path / "wheel")
    run(sys.executable, "-m", "pip", "install", *options, "--editable", tree, cwd=tmp_path)
    (tree / "drivers" / "written_later.py").write_text("WORD = 'seen'\n")
    code = IMPORT_ALL + "import pvfio.drivers.written_later as later\nprint(later.WORD, later.__file__)\n"
    output = isolated(code, tmp_path / "wheel", third_party, cwd=tmp_path).splitlines()
    assert output.pop() == f"seen {tree / 'pvfio' / 'drivers' / 'written_later.py'}"
    assert all(file.is_relative_to(tree / "pvfio") for file in imported_files(output[-1]))
    bare = isolated(IMPORT_BARE, tmp_path / "wheel", third_party, cwd=tmp_path)
    assert all(line.startswith("ModuleNotFoundError") for line in bare.splitlines())
