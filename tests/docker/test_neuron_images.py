"""The images for AWS Neuron: their rules, and what they install over AWS's own. No image is built here."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from core.accelerators.neuron import INDEX
from service.settings import Settings

ROOT = Path(__file__).parent.parent.parent
LINES = (ROOT / "docker" / "neuron.Dockerfile").read_text().splitlines()
TEXT = re.sub(r"\\\n", " ", "\n".join(line for line in LINES if not line.startswith("#")))
STAGES = {part.splitlines()[0].split(" AS ")[1]: part for part in re.split(r"^FROM ", TEXT, flags=re.MULTILINE)[1:]}
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "docker" / "neuron_requirements.py"))


def test_the_base_images_are_awss_by_exact_tag() -> None:
    images = re.findall(r"^ARG \w+_IMAGE=(\S+)$", TEXT, flags=re.MULTILINE)
    assert len(images) == 2
    for image in images:
        assert re.fullmatch(
            r"public\.ecr\.aws/neuron/[\w-]+:2\.9\.0-neuronx-py312-sdk\d+\.\d+\.\d+-ubuntu24\.04", image
        )


@pytest.mark.parametrize("stage", ["service", "training"])
def test_the_process_is_not_root_and_writes_where_a_mount_can_be(stage: str) -> None:
    text = STAGES[stage]
    assert text.count("USER 10001:10001") == 1
    after = text.split("USER 10001:10001")[1]
    assert not re.search(r"^(RUN|COPY|ADD) ", after, flags=re.MULTILINE)
    assert "ENTRYPOINT" in after  # AWS's starts TorchServe
    for setting in ("HOME=/tmp", "XDG_CACHE_HOME=/cache", "USE_TORCH_XLA=false", "PIP_ONLY_BINARY=:all:"):
        assert setting in text.split()


@pytest.mark.parametrize("stage", ["service", "training"])
def test_what_is_copied_is_there_and_reaches_the_build(stage: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    for arguments in re.findall(r"^COPY (.+)$", STAGES[stage], flags=re.MULTILINE):
        for source in arguments.split()[:-1]:
            assert list(ROOT.glob(source)), source
            assert f"!{source}" in ignore or (source.startswith("docker/") and "!docker/*.py" in ignore), source


def test_the_service_runs_on_one_core() -> None:
    assert "NEURON_RT_VISIBLE_CORES=0" in STAGES["service"].split()
    assert "SCALEDOWN_ACCELERATOR=neuron" in STAGES["service"].split()
    assert Settings.model_validate({"accelerator": "neuron"}).accelerator == "neuron"


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
