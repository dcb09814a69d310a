"""fio job files: sections, ``include``, ``${ENV}``, comments, and inheritance from ``[global]``.

Models what fio 3 reads: a line is ``key=value`` or a key alone (true); ``;`` and ``#`` begin comments; later
``[global]`` sections add to earlier ones for the jobs after them; ``$jobname``, ``$jobnum`` stay for whoever names
files; ``$ncpus``, ``$pagesize`` and ``$mb_memory`` are of this machine. ``include`` is relative to the file that has
it. Not modelled: ``exec_prerun``, reading from standard input more than once, shell quoting in values.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pvfio.errors import PvfioError

__all__ = ["JobFileError", "Section", "parse_job_files", "parse_job_text"]

_DEEPEST: Final = 16  # includes inside of includes
_LARGEST: Final = 1 << 20
_ENVIRONMENT: Final = re.compile(r"\$\{([^}]*)\}")
_KEYWORD: Final = re.compile(r"\$(ncpus|pagesize|mb_memory)\b")


class JobFileError(PvfioError):
    """A job file that cannot be: where, and why."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}")


@dataclass
class Section:
    """One job: its name, its own options and those of ``[global]`` before it, each in order and as text."""

    name: str
    where: str
    options: list[tuple[str, str]] = field(default_factory=list)
    inherited: list[tuple[str, str]] = field(default_factory=list)


class _Reader:
    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.globals: list[tuple[str, str]] = []
        self.sections: list[Section] = []
        self._current: Section | None = None
        self._in_global = False

    def read(self, path: Path, depth: int = 0) -> None:
        if depth > _DEEPEST:
            raise JobFileError(str(path), "includes itself, or others, too deeply")
        self.text(load(path), str(path), path.parent, depth)

    def text(self, text: str, name: str, folder: Path, depth: int = 0) -> None:
        for number, raw in enumerate(text.splitlines(), 1):
            line = re.split("[;#]", raw, maxsplit=1)[0].strip()
            if not line:
                continue
            where = f"{name}:{number}"
            if line.startswith("["):
                self._begin(line, where)
            elif line.split(None, 1)[0] == "include" and "=" not in line:
                self._include(line, where, folder, depth)
            else:
                self._option(line, where)

    def _begin(self, line: str, where: str) -> None:
        if not line.endswith("]") or not line[1:-1].strip():
            raise JobFileError(where, f"{line!r} is not a section")
        name = self._expand(line[1:-1].strip(), where)
        self._in_global = name.lower() == "global"
        if self._in_global:
            self._current = None
            return
        self._current = Section(name, where, inherited=list(self.globals))
        self.sections.append(self._current)

    def _include(self, line: str, where: str, folder: Path, depth: int) -> None:
        _, _, name = line.partition(" ")
        if not name.strip():
            raise JobFileError(where, "include names no file")
        self.read(folder / self._expand(name.strip(), where), depth + 1)

    def _option(self, line: str, where: str) -> None:
        key, equals, value = line.partition("=")
        # A key without a value is true; an empty value is an empty string.
        option = (key.strip().lower(), self._expand(value.strip(), where) if equals else "1")
        if self._in_global:
            self.globals.append(option)
        elif self._current is None:
            raise JobFileError(where, f"{line!r} is in no section")
        else:
            self._current.options.append(option)

    def _expand(self, text: str, where: str) -> str:
        def variable(match: re.Match[str]) -> str:
            if match[1] not in self.environment:
                raise JobFileError(where, f"{match[1]!r} is not in the environment")
            return self.environment[match[1]]

        return _KEYWORD.sub(lambda match: str(_keyword(match[1])), _ENVIRONMENT.sub(variable, text))


def load(path: Path) -> str:
    """The text of a job file. ``JobFileError``."""
    try:
        if not path.is_file():
            raise JobFileError(str(path), "no such file")
        if path.stat().st_size > _LARGEST:
            raise JobFileError(str(path), f"has more than {_LARGEST} bytes")
        return path.read_text()
    except OSError as error:
        raise JobFileError(str(path), error.strerror or "cannot be read") from None
    except UnicodeDecodeError:
        raise JobFileError(str(path), "is not text") from None


def _keyword(name: str) -> int:
    if name == "ncpus":
        return os.cpu_count() or 1
    if name == "pagesize":
        return os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def parse_job_files(paths: Sequence[Path], environment: Mapping[str, str] | None = None) -> list[Section]:
    """The jobs of all files in order; ``[global]`` holds within its file, as with fio. ``JobFileError``."""
    found: list[Section] = []
    for path in paths:
        reader = _Reader(os.environ if environment is None else environment)
        reader.read(path)
        if not reader.sections:
            raise JobFileError(str(path), "there is no job in it")
        found += reader.sections
    return found


def parse_job_text(
    text: str, environment: Mapping[str, str] | None = None, *, folder: Path | None = None, name: str = "job"
) -> list[Section]:
    """The jobs of a job file's text; ``folder`` is where its includes are. ``JobFileError``."""
    reader = _Reader(os.environ if environment is None else environment)
    reader.text(text, name, folder or Path())
    return reader.sections
