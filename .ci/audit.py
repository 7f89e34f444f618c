"""Look up the known vulnerabilities of what is installed, or write its bill of materials.

    python .ci/audit.py                 asks PyPI's advisory service, and OSV where that knows nothing
    python .ci/audit.py sbom            CycloneDX JSON on standard output; asks nobody

Exit status: 0 nothing known, 1 something known, 2 nobody could be asked, which is not the same as nothing known.
"""

import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OURS = "scaledown"
Dependency = dict[str, Any]  # as pip-audit's JSON has it


def installed() -> list[str]:
    """`name==version` of every package here. torch's build is left out of its version: advisories do not know it."""
    found = {
        each.metadata["Name"].lower(): each.version.partition("+")[0] for each in importlib.metadata.distributions()
    }
    return [f"{name}=={version}" for name, version in sorted(found.items()) if name != OURS]


def run(requirements: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """pip-audit on pinned requirements, without installing or resolving anything."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"]
    command += ["--progress-spinner", "off", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def audit(requirements: Path) -> int:
    """Print what is known; the exit status."""
    reasons = []
    for service in ("pypi", "osv"):
        result = run(requirements, "--vulnerability-service", service, "--format", "json")
        try:
            dependencies: list[Dependency] = json.loads(result.stdout)["dependencies"]
        except (ValueError, KeyError):  # it gave up: nobody answered
            reasons.append(f"{service}: {(result.stderr.strip().splitlines() or ['no answer'])[-1]}")
            continue
        # Offline, pip-audit finds no package, skips each, and calls that "no known vulnerabilities".
        if any("skip_reason" not in each for each in dependencies):
            return report(dependencies)
        reasons.append(f"{service}: knows none of the packages, so it was not really reached")
    print("NOT AUDITED: no advisory service could be reached from here.", *reasons, sep="\n  ")
    return 2


def report(dependencies: list[Dependency]) -> int:
    """Print findings and what could not be looked up; the exit status."""
    skipped = [each["name"] for each in dependencies if "skip_reason" in each]
    found = [(each, finding) for each in dependencies for finding in each.get("vulns", ())]
    for each, finding in found:
        fixed = ", ".join(finding["fix_versions"]) or "no version yet"
        print(f"{each['name']} {each['version']}: {finding['id']}, fixed in {fixed}")
    print(f"{len(dependencies) - len(skipped)} packages looked up, {len(found)} known vulnerabilities")
    if skipped:
        print(f"not looked up: {', '.join(skipped)}")
    return 1 if found else 0


def bill_of_materials() -> dict[str, Any]:
    """What is installed as a CycloneDX 1.6 document."""
    pins = [pin.partition("==") for pin in installed()]
    components = [
        {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name}@{version}"}
        for name, _, version in pins
    ]
    ours = {"type": "application", "name": OURS, "version": importlib.metadata.version(OURS)}
    head = {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1}
    return {**head, "metadata": {"component": ours}, "components": components}


def main(arguments: list[str]) -> int:
    """Audit, or print the bill of materials; the exit status."""
    if arguments == ["sbom"]:
        print(json.dumps(bill_of_materials(), indent=2))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "installed.txt"
        requirements.write_text("\n".join(installed()) + "\n", encoding="utf-8")
        return audit(requirements)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
