"""The images for AWS Neuron: their rules, and what they install over AWS's own. No image is built here."""

import json
import re
import runpy
from typing import Any

from core.accelerators.neuron import INDEX
from service.settings import Settings
from tests.docker.dockerfile import DOCKER, ROOT, base_of, inherited

SCRIPT: dict[str, Any] = runpy.run_path(str(DOCKER / "neuron_requirements.py"))
CLAIM = "not run on Neuron hardware"


def test_the_base_images_are_awss_by_exact_tag() -> None:
    for target in ("service", "training"):
        assert base_of("neuron.Dockerfile", f"{target}-environment") == base_of("neuron.Dockerfile", target)
        assert re.fullmatch(
            r"public\.ecr\.aws/neuron/[\w-]+:2\.9\.0-neuronx-py312-sdk\d+\.\d+\.\d+-ubuntu24\.04",
            base_of("neuron.Dockerfile", target),
        )


def test_the_service_runs_on_one_core() -> None:
    variables = " ".join(text for name, text in inherited("neuron.Dockerfile", "service") if name == "ENV").split()
    assert {"NEURON_RT_VISIBLE_CORES=0", "SCALEDOWN_ACCELERATOR=neuron", "USE_TORCH_XLA=false"} <= set(variables)
    assert Settings.model_validate({"accelerator": "neuron"}).accelerator == "neuron"


def test_what_was_not_run_on_hardware_is_said_until_there_is_a_receipt() -> None:
    """A receipt of `service.neuron_smoke` is kept in docs/."""
    receipts = [json.loads(path.read_text()) for path in (ROOT / "docs").glob("neuron-receipt*.json")]
    run = any(receipt["accelerator"] == "neuron" and receipt["ok"] for receipt in receipts)
    assert (CLAIM in (ROOT / "README.md").read_text()) is not run


def test_the_sdk_stays_as_it_is() -> None:
    pins = ["# a comment", "", "torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6", "PyYAML==6.0.3"]
    installed = {"torch": "2.9.0", "neuronx-cc": "2.27.5334.0"}
    held = SCRIPT["constraints"](pins, installed)
    assert held == ["transformers==5.23.0", "PyYAML==6.0.3", "neuronx-cc==2.27.5334.0", "torch==2.9.0"]
    project = {
        "dependencies": ["pydantic>=2.12"],
        "optional-dependencies": {"service": ["torch>=2.9", "fastapi>=0.115"], "training": ["scaledown[service]"]},
    }
    assert SCRIPT["requirements"](project, ["service", "training"]) == ["pydantic>=2.12", "fastapi>=0.115"]


def test_no_extra_would_install_pypis_placeholders() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert not re.search(r"neuron(x|-)|libneuronxla", project)
    requirements = (ROOT / "requirements" / "neuron-sdk.txt").read_text()
    assert f"--extra-index-url {INDEX}" in requirements
    pins = [line for line in requirements.splitlines() if re.match(r"\w", line)]
    assert pins
    assert all(re.fullmatch(r"[\w-]+==2\.[\d.]+", pin) for pin in pins)
