"""The wheel as a new user gets it: built from what git has, installed in an environment of its own."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("pyproject.toml", "README.md", "LICENSE", "core", "service", "training")
LIGHT = {"argcomplete", "httpx", "pydantic", "rich"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves its own files in the source."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    pip("wheel", "--no-build-isolation", "--wheel-dir", ".", ".", at=folder)
    (made,) = folder.glob("*.whl")
    return made


def run(*command: str, at: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=at, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pip(*arguments: str, at: Path) -> None:
    """Without a network and without dependencies."""
    offline = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_QUIET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    run(sys.executable, "-m", "pip", *arguments, at=at, **offline)


def test_the_wheel_holds_all_that_is_not_code(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    data = {"service/page/*", "training/configs/**/*.yaml", "core/py.typed", "service/py.typed", "training/py.typed"}
    expected = {str(path.relative_to(ROOT)) for pattern in data for path in ROOT.glob(pattern) if path.is_file()}
    assert len(expected) > 5
    assert expected <= names
    tops = {name.split("/")[0] for name in names}
    assert {name for name in tops if not name.endswith(".dist-info")} == {"core", "service", "training"}


def test_the_client_is_light_and_the_rest_are_extras(wheel: Path) -> None:
    folder = next(name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" in name)
    metadata = PathDistribution(zipfile.Path(wheel) / folder)
    plain = {re.split(r"[<>=;\[ ]", line)[0] for line in metadata.requires or () if "extra ==" not in line}
    assert plain == LIGHT
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(metadata.metadata.get_all("Provides-Extra") or ()) == set(extras)
    assert {"client", "haystack", "langchain", "llamaindex", "service", "training", "dev"} <= set(extras)


def test_the_command_works_where_only_the_wheel_is_installed(wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "fresh", at=tmp_path)
    python = str(tmp_path / "fresh" / "bin" / "python")
    pip("--python", python, "install", str(wheel), at=tmp_path)
    (site,) = (tmp_path / "fresh").glob("lib/*/site-packages")
    # The dependencies are those of this environment; its .pth files, and the checkout they name, stay out.
    (site / "dependencies.pth").write_text(str(Path(pytest.__file__).parents[1]) + "\n")
    command = str(tmp_path / "fresh" / "bin" / "scaledown")
    assert "answer" in run(command, "--help", at=tmp_path)
    assert "prepare" in run(command, "train", "--help", at=tmp_path)
    assert "--max-passages" in run(command, "serve", "--help", at=tmp_path)
    where = run(python, "-c", "import core, service, training; print(core.__file__)", at=tmp_path)
    assert where.startswith(str(site))


def test_the_client_imports_httpx_and_pydantic_only() -> None:
    code = (
        "import sys; import httpx, pydantic; before = set(sys.modules); import service.client; "
        "new = {name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names); print(*new)"
    )
    # pydantic imports its own parts late, and who knows a platform's settings has that platform's name.
    found = {name for name in run(sys.executable, "-c", code, at=ROOT).split() if not name.startswith("_sysconfigdata")}
    assert found <= {"service", "pydantic", "pydantic_core"}
