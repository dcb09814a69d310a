"""The import table: the project keeps it, and a project that breaks it anywhere is told so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ANYTHING = None

# The table as the design states it; errors, abi and _native are importable by all and not repeated.
TABLE: dict[str, set[str] | None] = {
    "errors": set(),
    "abi": set(),
    "memory": set(),
    "pagetable": {"memory"},
    "silicon": {"memory", "pagetable"},
    "host": {"memory", "pagetable", "silicon"},
    "guest": {"memory", "pagetable"},
    "guest.dma_api": {"guest", "memory", "pagetable"},
    "vfio": {"memory"},
    "backends": set(),
    "backends.emulated": {"vfio", "guest", "guest.dma_api"},
    "backends.linux": {"vfio"},
    "vfio_user": set(),
    "vfio_user.client": {"vfio_user", "vfio", "memory"},
    "vfio_user.server": {"vfio_user", "memory", "silicon"},
    "drivers": {"vfio"},
    "devices": {"memory", "silicon"},
    "workloads": {"drivers", "vfio", "guest.dma_api", "pagetable"},
    "machine": ANYTHING,
    "open": ANYTHING,
    "cli": ANYTHING,
    "": {"machine", "open"},
}
FOR_ALL = {"errors", "abi"}
# A module may import what lies in its own room.
OWN = {("guest", "guest.dma_api")}


def lint(project: Path) -> tuple[int, str]:
    """Exit status and output of lint-imports, run as by hand in a project's root."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "COLUMNS": "400", "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def broken(output: str) -> set[tuple[str, str]]:
    """The (importer, imported) pairs of a report, without the root package's name."""
    found = re.findall(r"^pvfio\.?(\S*) -> pvfio\.?(\S*) \(l\. [\d, ]+\)", output, re.MULTILINE)
    return {(importer, imported) for importer, imported in found}


def path_of(root: Path, room: str) -> Path:
    if room in ("machine", "open", "cli") or room.count("."):
        return root.joinpath("pvfio", *room.split(".")).with_suffix(".py")
    return root.joinpath("pvfio", room, "__init__.py") if room else root / "pvfio" / "__init__.py"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with the real configuration and links, and an empty module for every room."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    contract = tmp_path / "tests" / "packaging"
    contract.mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "packaging" / "import_table.py", contract)
    (tmp_path / "pvfio").mkdir()
    for name in ("drivers", "devices"):
        (tmp_path / name).mkdir()
        (tmp_path / "pvfio" / name).symlink_to(f"../{name}")
    for room in TABLE:
        path = path_of(tmp_path, room)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_the_project_keeps_the_table() -> None:
    status, output = lint(ROOT)
    assert status == 0, output
    assert "Who may import whom KEPT" in output


def test_an_empty_house_keeps_the_table(project: Path) -> None:
    assert lint(project)[0] == 0


def test_every_pair_of_rooms(project: Path) -> None:
    """Every room imports every other, and exactly the pairs that are not in the table are reported."""
    for room in TABLE:
        others = [other for other in TABLE if other != room]
        lines = [f"import pvfio.{other}\n" if other else "import pvfio\n" for other in others]
        path_of(project, room).write_text("".join(lines))
    expected = {
        (room, other)
        for room, row in TABLE.items()
        for other in TABLE
        if other != room and row is not ANYTHING and other not in row | FOR_ALL and (room, other) not in OWN
    }
    status, output = lint(project)
    assert status == 1
    assert broken(output) == expected


@pytest.mark.parametrize(
    ("room", "text", "expected"),
    [
        ("guest", "def late():\n    import pvfio.host\n", ("guest", "host")),
        (
            "guest",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pvfio.host\n",
            ("guest", "host"),
        ),
        ("guest.dma_api", "from .. import host\n", ("guest.dma_api", "host")),
        ("guest", "from pvfio import Machine\n", ("guest", "")),
        ("drivers", "from pvfio import memory\n", ("drivers", "memory")),
        ("devices", "from pvfio.guest.dma_api import dma_map\n", ("devices", "guest.dma_api")),
        ("errors", "from pvfio.abi import lib\n", None),
        ("vfio", "from pvfio.backends.emulated import open_container\n", ("vfio", "backends.emulated")),
    ],
)
def test_an_import_is_seen_wherever_it_is(
    project: Path, room: str, text: str, expected: tuple[str, str] | None
) -> None:
    path_of(project, room).write_text(text)
    status, output = lint(project)
    assert broken(output) == ({expected} if expected else set())
    assert status == (1 if expected else 0)


def test_a_chain_through_a_new_room_is_refused(project: Path) -> None:
    """guest -> novel -> host: a room nobody has given a row cannot carry an import across."""
    path_of(project, "guest").write_text("import pvfio.novel\n")
    (project / "pvfio" / "novel.py").write_text("import pvfio.host\n")
    status, output = lint(project)
    assert status == 1
    assert "pvfio.novel belongs to no room of the table" in output
    assert broken(output) == {("guest", "novel")}


def test_a_row_that_names_no_room_is_refused(project: Path) -> None:
    configuration = project / "pyproject.toml"
    text = configuration.read_text()
    configuration.write_text(text.replace('drivers = ["vfio"]', 'drivers = ["vfoi"]'))
    status, output = lint(project)
    assert status == 1
    assert "rooms without a row: vfoi" in output
