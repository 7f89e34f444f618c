"""What the Neuron images install on top of AWS's: our requirements, and constraints that keep the SDK as it is.

Writes neuron-requirements.txt and neuron-constraints.txt from pyproject.toml and constraints.txt, for the extras named
on the command line: our pins, but for packages of the SDK, which are held at the version that is installed.
"""

import importlib.metadata
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

SDK = frozenset({"libneuronxla", "neuronx-cc", "numpy", "torch", "torch-neuronx", "torch-xla"})
NAME = re.compile(r"[A-Za-z0-9._-]+")


def name_of(requirement: str) -> str:
    """The package of a requirement, normalised; empty for a comment or an empty line."""
    match = NAME.match(requirement.strip())
    return re.sub(r"[._]", "-", match[0]).lower() if match else ""


def requirements(project: Mapping[str, list[str] | dict[str, list[str]]], extras: Iterable[str]) -> list[str]:
    """The project's own and its extras' requirements, without those of the SDK and the project itself."""
    base, optional = project["dependencies"], project["optional-dependencies"]
    assert isinstance(base, list)
    assert isinstance(optional, dict)
    wanted = [*base, *(requirement for extra in extras for requirement in optional[extra])]
    return [each for each in wanted if name_of(each) not in SDK | {"scaledown"}]


def constraints(pins: Iterable[str], installed: Mapping[str, str]) -> list[str]:
    """Our pins, but for the SDK's packages; those at the version in `installed`."""
    ours = [pin.strip() for pin in pins if name_of(pin) and name_of(pin) not in SDK]
    return [*ours, *(f"{name}=={version}" for name, version in sorted(installed.items()))]


def installed_sdk() -> dict[str, str]:
    """Versions of the SDK's packages that are there."""
    versions = {}
    for name in SDK:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def main() -> None:
    """Write the two files."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = Path("constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted, held = requirements(project, sys.argv[1:]), constraints(pins, installed_sdk())
    Path("neuron-requirements.txt").write_text("\n".join(wanted) + "\n", encoding="utf-8")
    Path("neuron-constraints.txt").write_text("\n".join(held) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
