"""The notebook of examples/ from its first cell to its last, on the real base models, with one training step."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.docs.conftest import ROOT

NOTEBOOK = ROOT / "examples" / "laptop.ipynb"
SECONDS = 300  # for one cell, on a machine that does other things


def read_notebook() -> nbformat.NotebookNode:
    notebook: nbformat.NotebookNode = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]  # has none
    return notebook


def test_it_holds_no_outputs() -> None:
    notebook = read_notebook()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_from_raw_data_to_a_served_answer(
    smollm2: Path, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAPTOP_STEPS", "1")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("SCALEDOWN_COMPRESSOR_TOKEN_US", "10")  # measuring them takes a while
    monkeypatch.setenv("SCALEDOWN_PREFILL_TOKEN_US", "100")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that share a busy core wait for each other
    notebook = read_notebook()
    client = NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.execute()
    printed = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream" and output.name == "stdout"
    )
    steps = re.findall(r"^(\d+) \d+\.\d+$", printed, flags=re.MULTILINE)
    assert steps == ["1"]
    usage = re.search(r"Usage\(text_tokens=(\d+), prompt_tokens=(\d+)", printed)
    assert usage is not None
    assert 0 < int(usage[2]) < int(usage[1])
    shown = re.findall(r"^[01]\.\d+ (text|compressed|hybrid) \S+", printed, flags=re.MULTILINE)
    assert sorted(shown) == ["compressed", "compressed", "compressed", "hybrid"]
