"""Print one of the README's own commands: ``readme_commands.py N``, N from 1.

The commands are the ``sh`` blocks below the heading "Try it", one command a block line; a line that ends in a backslash
goes on in the next. There are exactly two: the first installs pvfio and runs its main job, the second installs what the
tests need and runs them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
SECTION = re.compile(r"^## Try it\n(.*?)(?=^#{1,2} |\Z)", re.DOTALL | re.MULTILINE)
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def commands(readme: str) -> list[str]:
    """The commands in the order they stand, continuation lines joined."""
    section = SECTION.search(readme)
    if section is None:
        raise SystemExit('README.md has no section "## Try it"')
    text = "".join(BLOCK.findall(section[1])).replace("\\\n", " ")
    found = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if len(found) != 2:
        raise SystemExit(f'README.md: {len(found)} commands below "Try it", expected 2')
    return found


if __name__ == "__main__":
    print(commands(README.read_text())[int(sys.argv[1]) - 1])
