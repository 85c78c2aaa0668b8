"""The lowest versions that pyproject.toml allows, as a requirements file: what its bounds claim can so be tried.

python -m tools.lowest [EXTRA ...] > lowest.txt && pip install -r lowest.txt
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w-]+)(?:>=|==)(?P<lowest>[\d.]+)(?:,<[\d.]+)?(?P<marker>;.*)?")


def lowest(extras: Sequence[str] = ()) -> list[str]:
    """A line for each requirement of the package and of these extras, with its marker.

    Raises:
        ValueError: a requirement has no lower bound; KeyError: there is no such extra.
    """
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    lines = []
    for requirement in [*project["dependencies"], *(r for e in extras for r in project["optional-dependencies"][e])]:
        found = REQUIREMENT.fullmatch(requirement)
        if found is None:
            raise ValueError(f"{requirement} has no lower bound of the form name>=1.2")
        lines.append(f"{found['name']}=={found['lowest']}{found['marker'] or ''}")
    return lines


if __name__ == "__main__":
    print("\n".join(lowest(sys.argv[1:])))
