"""Pin what the images of docker/Dockerfile install to the versions that are installed here, which the tests ran with.

    python .ci/pins.py > requirements/images.txt

torch is pinned in constraints.txt, and pins CUDA's libraries itself.
"""

import importlib.metadata
import sys

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

EXTRAS = ("service", "otel", "redis", "training")
# The images' Python, whichever runs this.
PYTHON = {"python_version": "3.11", "python_full_version": "3.11.15", "sys_platform": "linux"}
HEAD = """\
# What docker/Dockerfile installs: the versions that the tests were run with. `make pins` writes it anew.
# torch is in constraints.txt. Not for AWS's images: there the SDK decides.
"""


def needed(requirement: Requirement) -> list[Requirement]:
    """What a package asks for, by its own metadata, with the extras that are asked of it. Empty if it is not here."""
    try:
        lines = importlib.metadata.requires(requirement.name) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    extras = ["", *requirement.extras]
    wanted = [Requirement(line) for line in lines]
    return [
        each
        for each in wanted
        if each.marker is None or any(each.marker.evaluate({**PYTHON, "extra": extra}) for extra in extras)
    ]


def is_exact(requirement: Requirement) -> bool:
    """Whether one version only will do."""
    return any(one.operator == "==" for one in requirement.specifier)


def packages() -> set[str]:
    """Normalised names of everything that the extras need, and what that needs, without the project and torch."""
    waiting, seen = [Requirement(f"scaledown[{','.join(EXTRAS)}]")], set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen:
            continue
        seen.add(str(requirement))
        waiting += [each for each in needed(requirement) if requirement.name != "torch" or not is_exact(each)]
    return {canonicalize_name(Requirement(line).name) for line in seen} - {"scaledown", "torch"}


def main() -> int:
    """Print the pins."""
    print(HEAD, *(f"{name}=={importlib.metadata.version(name)}\n" for name in sorted(packages())), sep="", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
