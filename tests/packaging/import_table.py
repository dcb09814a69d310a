"""An import-linter contract: the table of who may import whom.

The project's packages are rooms, and each has a row: the rooms it may import. A module belongs to the room
with the longest name that holds it, so ``backends.emulated`` has a row of its own beside ``backends``. Every
module must belong to some row and every import must be allowed by its row, wherever it is written: inside a
function or under ``TYPE_CHECKING`` as well. Hence whatever a chain of imports reaches is bounded by the table
too, and a room that has no row yet can do nothing unnoticed.

Not checked: imports by a computed name (``importlib``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class Break(NamedTuple):
    """One import that its importer's row does not allow; ``room`` is None for a module without a row."""

    importer: str
    imported: str
    room: str | None


class RoomsField(fields.Field[dict[str, list[str]]]):
    """A TOML table of room -> rooms."""

    def parse(self, raw_data: Any) -> dict[str, list[str]]:
        if not isinstance(raw_data, dict) or not all(isinstance(row, list) for row in raw_data.values()):
            raise fields.ValidationError("expected a table of lists")
        named = {name for row in raw_data.values() for name in row} - {"*"}
        unknown = {name for name in named if not any(holds(room, name) for room in raw_data)}
        if unknown:
            raise fields.ValidationError(f"rooms without a row: {', '.join(sorted(unknown))}")
        return raw_data


def holds(room: str, module: str) -> bool:
    """Whether ``module`` is ``room`` or lies below it."""
    return module == room or module.startswith(f"{room}.")


class ImportTable(Contract):
    """Every import stands in its importer's row.

    ``rooms``: the rows, names relative to the root package, "" for its own ``__init__``, "*" for all;
    ``importable_by_all``: rooms that need not be named in each row.
    """

    type_name = "import_table"

    rooms: Any = RoomsField()
    importable_by_all: Any = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Compare every import of the graph with its importer's row."""
        skip = len(self.session_options["root_packages"][0]) + 1
        found: list[Break] = []
        for importer in sorted(graph.modules):
            room = self._room_of(importer[skip:])
            if room is None:
                found.append(Break(importer, "", None))
                continue
            imports = sorted(graph.find_modules_directly_imported_by(importer))
            found += [Break(importer, name, room) for name in imports if not self._allowed(room, name[skip:])]
        return ContractCheck(kept=not found, metadata={"breaks": found, "graph": graph})

    def _room_of(self, module: str) -> str | None:
        return max((room for room in self.rooms if holds(room, module)), key=len, default=None)

    def _allowed(self, room: str, target: str) -> bool:
        row = [*self.rooms[room], *self.importable_by_all, room]
        # "guest.dma_api" names a part of a room; "vfio_user" leaves out "vfio_user.server", a room itself.
        parts = [name for name in row if name not in self.rooms]
        return "*" in row or self._room_of(target) in row or any(holds(part, target) for part in parts)

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Name each import with its lines and what its row allows."""
        graph: ImportGraph = check.metadata["graph"]
        for importer, imported, room in check.metadata["breaks"]:
            if room is None:
                output.print_error(f"{importer} belongs to no room of the table", bold=False)
                continue
            details = graph.get_import_details(importer=importer, imported=imported)
            lines = ", ".join(str(detail["line_number"]) for detail in details)
            allowed = ", ".join(self.rooms[room]) or "nothing"
            output.print_error(f"{importer} -> {imported} (l. {lines}): may import {allowed}", bold=False)
