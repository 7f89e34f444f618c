"""The whole way by the public commands: raw JSONL, prepare, label, train, evaluate, export, and the service answers."""

import json
from pathlib import Path

from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.tiny_training import PLACES, settings, write_run
from training.__main__ import main
from training.data_format import read_rows

COUNT = 24


def write_raw(folder: Path) -> tuple[Path, Path]:
    """Questions with their passages as somebody's export might hold them, and a collection to mine negatives from."""
    raw, collection = folder / "raw.jsonl", folder / "collection.jsonl"
    questions = []
    for number in range(COUNT):
        place = PLACES[number % 8]
        passage = {"title": f"Train {number}", "text": f"The train number {number} is in {place}."}
        asked = {"id": number, "question": f"Where is train number {number}?"}
        questions.append(asked | {"answers": [place], "positives": [passage]})
    raw.write_text("".join(json.dumps(question) + "\n" for question in questions) + "{broken\n", encoding="utf-8")
    texts = [
        {"title": "", "text": f"Ship number {number} carries coffee and salt over the sea."} for number in range(40)
    ]
    collection.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    return raw, collection


def test_from_raw_questions_to_an_answer_of_the_service(
    tiny_llama: Path, tiny_teacher: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    raw, collection = write_raw(tmp_path)
    rows, dev, labelled = (tmp_path / name for name in ("rows.jsonl", "dev.jsonl", "labelled.jsonl"))
    arguments = ["--source", str(raw), "--collection", str(collection), "--passages", "3"]
    assert main(["prepare", *arguments, "--dev-share", "0.2", "--out", str(rows), "--dev-out", str(dev)]) == 0
    prepared, _ = read_rows(rows)
    held_out, _ = read_rows(dev)
    assert len(prepared) + len(held_out) == COUNT
    assert all(len(row.passages) == 3 for row in prepared)

    teacher = ["--teacher", str(tiny_teacher), "--max-new-tokens", "12", "--device", "cpu", "--top-k", "4"]
    logits = tmp_path / "logits"
    assert main(["label", "--data", str(rows), *teacher, "--logits", str(logits), "--out", str(labelled)]) == 0
    assert any(row.teacher_answer for row in read_rows(labelled)[0])

    data = {"train": str(labelled), "dev": str(dev), "logits": str(logits), "modes": {"compressed": 0.5, "text": 0.5}}
    loss = {"kl": 0.5, "alignment": 0.2}
    config = write_run(tmp_path / "run", settings(tiny_llama, tiny_bert, data=data, loss=loss))
    assert main(["train", str(config), "--out", str(tmp_path / "run")]) == 0

    checkpoint = tmp_path / "checkpoints" / "v1"
    assert main(["export", str(tmp_path / "run"), str(checkpoint)]) == 0

    measured = ["--limit", "3", "--passages", "3", "--rates", "8", "--max-new-tokens", "4", "--resamples", "20"]
    options = ["--cost-questions", "1", "--device", "cpu", "--out", str(tmp_path / "evaluation")]
    assert main(["evaluate", "--checkpoint", str(checkpoint), "--data", str(dev), *measured, *options]) == 0
    assert json.loads((tmp_path / "evaluation" / "result.json").read_text(encoding="utf-8"))

    ask(checkpoint)


def ask(checkpoint: Path) -> None:
    """One answer of the service in every mode."""
    application = create_app(Settings.model_validate({"checkpoint": checkpoint, "batch_wait_ms": 0, "threads": 1}))
    passages = [{"text": "The train number 3 is in Paris."}, {"text": "Bread is made of flour."}]
    with TestClient(application) as client:
        for mode in ("compressed", "text", "hybrid"):
            question = {"query": "Where is train number 3?", "passages": passages, "mode": mode, "max_new_tokens": 4}
            reply = client.post("/answer", json=question)
            assert reply.status_code == 200, reply.text
            answer = reply.json()
            assert answer["checkpoint"].startswith("v1")
            assert isinstance(answer["answer"], str)
            assert len(answer["passages"]) == 2
