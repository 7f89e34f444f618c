"""Checkpoints damaged by chance, then signed anew: each loads as it should, or is refused with a CheckpointError.

Hashes are made to fit, as whoever can write to the folder can make them; what is left is what the files say. Nothing
but CheckpointError (BaseModelError for an encoder's or a generator's own files) may come out, and no load may take
memory that these files of a few MB do not account for.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.checkpoint import load_checkpoint
from core.errors import BaseModelError, CheckpointError
from core.manifest import MANIFEST
from tests.memory import little_memory
from tests.tiny_checkpoints import sign

TENSORS = [
    *(("saved", name) for name in ("compressor.safetensors", "generator.safetensors", "golden.safetensors")),
    ("merged", "generator/model.safetensors"),
]
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
DOCUMENTS = [
    *(("saved", name) for name in ("config.json", "golden.json", MANIFEST)),
    *(("saved", f"compressor_base/{name}") for name in MODEL_FILES),
    *(("merged", f"generator/{name}") for name in (*MODEL_FILES, "generation_config.json")),
]
TEMPLATE = "generator/chat_template.jinja"
FUZZ = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
NUMBERS = st.integers(-(2**70), 2**70) | st.sampled_from([0, -1, 2**31, 2**63, 2**64 - 1, 10**30])
VALUES: st.SearchStrategy[Any] = (
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8) | st.just([]) | st.just({})
)


def load_or_refuse(folder: Path) -> None:
    with little_memory(), contextlib.suppress(CheckpointError, BaseModelError):
        load_checkpoint(folder)


Fresh = Callable[[str], Path]


@pytest.fixture
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Fresh:
    """Makes a copy of the checkpoint of a fixture's name, in the place of the last one."""

    def copy(name: str) -> Path:
        shutil.rmtree(tmp_path / "v1", ignore_errors=True)
        return Path(shutil.copytree(request.getfixturevalue(name), tmp_path / "v1"))

    return copy


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON document there is a value, the containers included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = [] if not path else [path]
    for key, child in list(inner)[:40]:
        found += places(child, (*path, key))
    return found


def damaged(data: st.DataObject, document: Any) -> Any:
    """`document` with one value replaced, or one key gone or new."""
    *path, last = data.draw(st.sampled_from(places(document)), label="place")
    parent = document
    for key in path:
        parent = parent[key]
    match data.draw(st.sampled_from(["replace", "remove", "add"]), label="damage"):
        case "replace":
            parent[last] = data.draw(VALUES, label="value")
        case "remove":
            del parent[last]
        case "add" if isinstance(parent, dict):
            parent[data.draw(st.text(max_size=8), label="key")] = data.draw(VALUES, label="value")
    return document


@FUZZ
@given(data=st.data())
def test_damaged_headers_of_tensor_files(fresh: Fresh, data: st.DataObject) -> None:
    kind, name = data.draw(st.sampled_from(TENSORS), label="file")
    folder = fresh(kind)
    path = folder / name
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(damaged(data, json.loads(content[8 : 8 + size]))).encode()
    claimed = data.draw(st.just(len(header)) | st.integers(0, 2**64 - 1), label="length of the header")
    path.write_bytes(claimed.to_bytes(8, "little") + header + content[8 + size :])
    sign(folder)
    load_or_refuse(folder)


@FUZZ
@given(data=st.data())
def test_damaged_bytes_of_tensor_files(fresh: Fresh, data: st.DataObject) -> None:
    kind, name = data.draw(st.sampled_from(TENSORS), label="file")
    folder = fresh(kind)
    path = folder / name
    content = bytearray(path.read_bytes())
    size = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4), label="bytes changed")):
        content[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.just(len(content)) | st.integers(0, len(content)), label="cut at")])
    sign(folder)
    load_or_refuse(folder)


@FUZZ
@given(data=st.data())
def test_damaged_documents(fresh: Fresh, data: st.DataObject) -> None:
    kind, name = data.draw(st.sampled_from(DOCUMENTS), label="file")
    folder = fresh(kind)
    document = damaged(data, json.loads((folder / name).read_text()))
    (folder / name).write_text(json.dumps(document))
    if name != MANIFEST:
        sign(folder)
    load_or_refuse(folder)


@FUZZ
@given(raw=st.binary(max_size=64), file=st.sampled_from([*DOCUMENTS, *TENSORS, ("merged", TEMPLATE)]))
def test_files_that_are_something_else(fresh: Fresh, raw: bytes, file: tuple[str, str]) -> None:
    kind, name = file
    folder = fresh(kind)
    (folder / name).write_bytes(raw)
    if name != MANIFEST:
        sign(folder)
    load_or_refuse(folder)
