"""`make sbom`: what is installed, as a document that other tools read."""

import importlib.metadata
import json
import subprocess
import sys

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.docker.dockerfile import ROOT


def test_it_is_valid_cyclonedx_and_complete() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "$(BIN)/python .ci/audit.py sbom" in makefile
    command = [sys.executable, ".ci/audit.py", "sbom"]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    document = json.loads(text)
    version = SchemaVersion.from_version(document["specVersion"])
    assert JsonStrictValidator(version).validate_str(text) is None
    found = {component["name"]: component for component in document["components"]}
    installed = {each.metadata["Name"].lower() for each in importlib.metadata.distributions()} - {"scaledown"}
    assert set(found) == installed
    torch = importlib.metadata.version("torch").partition("+")[0]
    assert found["torch"]["purl"] == f"pkg:pypi/torch@{torch}"
