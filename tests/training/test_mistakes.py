"""What a new user gets wrong: every mistake is one line that names the option or key, and nothing is left behind."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tiny_training import make_rows, settings, write_run
from training.__main__ import main
from training.data_format import write_rows

QUESTION = {"id": "1", "question": "Where?", "answers": ["here"], "positives": [{"text": "It is here."}]}
FILES = {
    "empty.jsonl": b"",
    "empty.yaml": b"",
    "bytes.jsonl": b"\xff\xfe\n\xff",
    "broken.yaml": b"a: [1\nb: {",
    "list.yaml": b"- 1\n",
    "bytes.yaml": b"\xff\xfe",
    "sources.yaml": b"sources: [{path: raw.jsonl}]\n",
    "group.yaml": b"sources: [{path: raw.jsonl}]\nassembly: 3\n",
    "file": b"x",
    "raw.jsonl": json.dumps(QUESTION).encode(),
}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: the files above, rows, a folder with nothing in it."""
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    write_rows(tmp_path / "rows.jsonl", make_rows(4))
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mistake(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status of a command and the one line that it says, once it is found to have written nothing."""
    before = {path: path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")}
    try:
        status = main(line.split())
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    said = [text for text in capsys.readouterr().err.splitlines() if "error: " in text]
    assert len(said) == 1
    assert {path: path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")} == before
    return status, said[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prepare --source raw.jsonl --out o.jsonl --passages 0", "--passages: must be a whole number of at least 1"),
        ("prepare --source raw.jsonl --out o.jsonl --dev-share 2", "--dev-share: must be a number from 0 to below 1"),
        ("prepare --source raw.jsonl --out o.jsonl --seed -1", "--seed: must be a whole number from 0"),
        ("label --data rows.jsonl --out o.jsonl --teacher t --block 0", "--block: must be a whole number"),
        (
            "label --data rows.jsonl --out o.jsonl --teacher t --device no",
            "--device: 'no' is no device of this machine",
        ),
        ("init --out o --n-layers x", "--n-layers: must be a whole number of at least 1, not 'x'"),
        ("train sources.yaml --out o --device no", "--device: invalid choice: 'no'"),
        ("evaluate --checkpoint c --data rows.jsonl --out o --limit 0", "--limit: must be a whole number"),
        ("evaluate --checkpoint c --data rows.jsonl --out o --batch-size 0", "--batch-size: must be"),
        ("calibrate --checkpoint c --results r --out o --rate 0", "--rate: must be a whole number"),
        ("benchmark sources.yaml --steps 0", "--steps: must be a whole number of at least 1"),
        ("report", "arguments are required: --out"),
    ],
)
def test_an_option_out_of_range_is_wrong_usage(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = mistake(line, capsys)
    assert status == 2
    assert message in said


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("prepare --source none.jsonl --out o.jsonl", "none.jsonl: no such file"),
        ("prepare --source empty.jsonl --out o.jsonl", "empty.jsonl: is empty"),
        ("prepare --source bytes.jsonl --out o.jsonl", "bytes.jsonl: none of its 2 rows can be used"),
        ("prepare --source raw.jsonl,limit=[ --out o.jsonl", "--source raw.jsonl,limit=[: limit, line 1: not YAML"),
        ("prepare --source raw.jsonl,limit=0 --out o.jsonl", "limit: must be greater than or equal to 1"),
        ("prepare --source raw.jsonl,columns=x --out o.jsonl", "columns: must be a group of keys"),
        ("prepare --source raw.jsonl --out o.txt", "--out o.txt: the name must end in .jsonl or .jsonl.gz"),
        ("prepare --source raw.jsonl --out raw.jsonl", "--out raw.jsonl: is read, too"),
        ("prepare --source raw.jsonl --out folder", "--out folder: is a folder, not a file"),
        ("prepare --source raw.jsonl --out file/o.jsonl", "file is a file, not a folder"),
        ("prepare --source raw.jsonl --dev-share 0.5 --out o.jsonl --dev-out o.jsonl", "--dev-out o.jsonl: is read"),
        ("prepare --source raw.jsonl --dev-share 0.01 --out o.jsonl --dev-out d.jsonl", "--dev-share 0.01: no rows"),
        ("prepare --source raw.jsonl --collection empty.jsonl --out o.jsonl", "empty.jsonl: is empty"),
        ("prepare --source raw.jsonl --held-out empty.jsonl --out o.jsonl", "empty.jsonl: is empty"),
        ("prepare --config list.yaml --out o.jsonl", "list.yaml: must be a mapping"),
        ("prepare --config broken.yaml --out o.jsonl", "broken.yaml, line 2: not YAML"),
        ("prepare --config group.yaml --passages 2 --out o.jsonl", "assembly: must be a group of keys"),
        ("label --data none.jsonl --teacher t --out o.jsonl", "--data none.jsonl: no such file"),
        ("label --data folder --teacher t --out o.jsonl", "--data folder: is a folder, not a file"),
        ("label --data empty.jsonl --teacher t --out o.jsonl", "--data empty.jsonl: no rows to label"),
        ("label --data rows.jsonl --teacher t --out o.jsonl --logits file", "--logits file: is a file, not a folder"),
        ("init --out folder", "--out folder: exists already"),
        ("init --out file/o", "file is a file, not a folder"),
        ("init --out o compressor.rates=[8", "'compressor.rates=[8', line 1: not YAML"),
        ("init --out o compressor.rates=[4096]", "model: compressor.rates: 4096 is over chunk_tokens (128)"),
        ("init --out o --config sources.yaml", "sources.yaml: sources: unknown key"),
        ("train bytes.yaml --out o", "bytes.yaml: is not text in UTF-8"),
        ("train none.yaml --out o", "none.yaml: No such file"),
        ("train sources.yaml --out o", "sources.yaml: sources: unknown key"),
        ("train empty.yaml --out o", "empty.yaml: model.generator.lora: the generator is to be trained"),
        ("evaluate --checkpoint folder --data rows.jsonl --out o", "--checkpoint folder: holds no checkpoint"),
        ("evaluate --checkpoint none --data rows.jsonl --out o", "--checkpoint none: no such folder"),
        ("calibrate --checkpoint none --results rows.jsonl --out o", "--checkpoint none: no such folder"),
        ("report --out o", "give --result, --metrics or both"),
        ("report --result none.json --out o", "--result none.json: no such file"),
        ("report --metrics rows.jsonl --out o", "holds no metrics of a training run"),
        ("export folder o", "holds neither a checkpoint"),
        ("benchmark list.yaml", "list.yaml: must be a mapping"),
    ],
)
def test_what_does_not_fit_is_named(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = mistake(line, capsys)
    assert status == 1
    assert said.startswith("error: ")
    assert message in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=none.jsonl", "data.train none.jsonl: no such file"),
        ("data.dev=folder", "data.dev folder: is a folder"),
        ("data.dev=empty.jsonl", "data.dev empty.jsonl: has no usable row"),
        ("start=folder", "start folder: holds no weights"),
        ("loop.batch_size=0", "loop.batch_size: must be greater than or equal to 1"),
        ("optimizer.betas=[2,3]", "optimizer.betas.0: must be less than 1"),
        ("optimizer.compressor_lr=.inf", "optimizer.compressor_lr: must be a finite number"),
        ("loss={answer: 0, relevance: 0}", "loss: every part has weight 0"),
        ("model.compressor.n_layers=99", "n_layers: 99 is over the generator's"),
        ("model.generator.lora.target_modules=[none]", "target_modules"),
        ("optimizer.compressor_lr=1e30", "is no number any more"),
    ],
)
def test_a_run_that_cannot_be_trained_says_so(
    override: str, message: str, tiny_llama: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(place, settings(tiny_llama, loop={"max_steps": 1}))
    assert main(["train", str(config), "--out", "run", override]) == 1
    assert message in capsys.readouterr().err
    if "1e30" not in override:
        assert not (place / "run").exists()


@pytest.mark.parametrize("kind", ["bce", "bce_listwise"])
def test_a_rerankers_logits_are_no_labels(
    kind: str, tiny_llama: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(4)
    scored = replace(rows[2], passages=(rows[2].passages[0], replace(rows[2].passages[1], relevance=-9.25)))
    loop = {"max_steps": 1}
    config = write_run(place, settings(tiny_llama, loop=loop, loss={"relevance_kind": kind}), [*rows[:2], scored])
    assert main(["train", str(config), "--out", "run"]) == 1
    message = f"data.train: row 'r2', passages.1.relevance is -9.25, but loss.relevance_kind {kind} learns labels"
    assert message in capsys.readouterr().err
    assert not (place / "run").exists()
    assert main(["train", str(config), "--out", "run", "loss.relevance_kind=mse"]) == 0


def test_a_models_folder_is_no_runs_folder(tiny_llama: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_run(place, settings(tiny_llama))
    assert main(["train", str(config), "--out", str(tiny_llama)]) == 1
    assert "holds a model or a checkpoint" in capsys.readouterr().err


def test_an_encoder_is_no_generator(tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--generator", str(tiny_bert), "--out", "o"]) == 1
    assert str(tiny_bert) in capsys.readouterr().err
