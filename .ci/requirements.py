"""Print requirements of pyproject.toml, one a line: the named extras', and with --dependencies the package's own.

For `pip install $(python .ci/requirements.py test)`: the environment is made before pykernels is built in it.
"""

from __future__ import annotations

import pathlib
import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

project = tomllib.loads((pathlib.Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = [name for name in sys.argv[1:] if name != "--dependencies"]
found = list(project["dependencies"]) if "--dependencies" in sys.argv else []
for name in extras:
    found += project["optional-dependencies"][name]
print("\n".join(requirement.replace(" ", "") for requirement in found))
