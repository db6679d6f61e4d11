"""Print the requirements in pyproject.toml of the product and its tests, each at the oldest allowed version."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
for requirement in [*project["project"]["dependencies"], *project["dependency-groups"]["dev"]]:
    print(requirement.replace(">=", "==", 1))
