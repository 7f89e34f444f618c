"""What the layout promises: arrows between packages, what each may not touch, file sizes and names. Read by AST."""

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("core", "service", "training")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 300
MAX_FUNCTION_LINES = 60
VAGUE_NAMES = {"utils", "util", "helpers", "helper", "misc", "common"}

# The arrows: service -> core <- training. What a package must be able to live without comes after its siblings.
FORBIDDEN_IMPORTS = {
    "core": {
        "service",
        "training",
        "tests",
        "fastapi",
        "starlette",
        "uvicorn",
        "httpx",
        "argparse",
        "peft",
        "datasets",
    },
    "service": {"training", "tests", "peft", "datasets"},
    "training": {"service", "tests", "fastapi", "starlette", "uvicorn"},
}
# What an adapter may import beside the standard library. Whoever has one framework need not have the others, nor torch.
ADAPTER_IMPORTS = {
    "haystack": ("haystack", "service.client"),
    "langchain": ("langchain_core", "pydantic", "service.client"),
    "llamaindex": ("llama_index.core", "service.client"),
}
UNSAFE_IMPORTS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=label(path))


def imported_modules(tree: ast.Module) -> Iterator[str]:
    """Full names of what is imported anywhere in the file, lazy imports inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction of an arrow"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names_used(tree: ast.Module) -> set[str]:
    """Names called and dotted attributes read, such as `print`, `os.environ`, `torch.load`."""
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            used.add(node.func.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add(f"{node.value.id}.{node.attr}")
    return used


def test_the_packages_have_sources() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_imports_point_the_right_way(path: Path) -> None:
    modules = set(imported_modules(tree_of(path)))
    tops = {module.split(".")[0] for module in modules}
    package = path.relative_to(ROOT).parts[0]
    assert not tops & FORBIDDEN_IMPORTS[package]
    assert not tops & UNSAFE_IMPORTS


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_nothing_is_unpickled(path: Path) -> None:
    tree = tree_of(path)
    assert not names_used(tree) & {"torch.load", "np.load", "numpy.load", "eval", "exec"}
    # vLLM takes embeddings in this form only. Writing it is harmless; reading it, which is vLLM's risk, is not done.
    assert "torch.save" not in names_used(tree) or label(path) == "service/generation/vllm_wire.py"
    assert "torch.load" not in set(imported_modules(tree))
    trusting = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg in {"trust_remote_code", "allow_pickle"}
        if not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert not trusting, "trust_remote_code and allow_pickle stay off"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.is_relative_to(ROOT / "core")], ids=label)
def test_core_takes_its_inputs_as_arguments(path: Path) -> None:
    tree = tree_of(path)
    assert not names_used(tree) & {"print", "input", "os.environ", "os.getenv", "sys.argv"}
    assert not set(imported_modules(tree)) & {"os.environ", "os.getenv", "sys.argv"}


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_files_and_functions_stay_readable(path: Path) -> None:
    tree = tree_of(path)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    assert path.stem not in VAGUE_NAMES
    assert not set(path.relative_to(ROOT).parent.parts) & VAGUE_NAMES
    assert ast.get_docstring(tree), "a module says what it is for"
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert not long


@pytest.mark.parametrize("framework", ADAPTER_IMPORTS)
def test_an_adapter_needs_its_framework_and_the_client_only(framework: str) -> None:
    modules = imported_modules(tree_of(ROOT / "service" / "adapters" / f"{framework}.py"))
    allowed = tuple(f"{name}." for name in ADAPTER_IMPORTS[framework])
    foreign = {module for module in modules if module.split(".")[0] not in sys.stdlib_module_names}
    assert {module for module in foreign if not f"{module}.".startswith(allowed)} == set()


def test_tests_are_no_package() -> None:
    """With an __init__.py, pytest could take tests/core for the package `core`."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_ships_our_package_names(package: str) -> None:
    providers = importlib.metadata.packages_distributions().get(package, [])
    assert set(providers) == {"scaledown"}
