"""Where the links of a path lead."""

import os
from pathlib import Path


def followed(path: Path) -> Path:
    """The path without links. Of a circle something in it, where `Path.resolve` raises: loading then refuses it."""
    return Path(os.path.realpath(path))
