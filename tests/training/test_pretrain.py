"""Pretraining on texts: what is asked for, and that `train` goes on from it."""

import gzip
import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from core.model import Model
from core.passages import Passage
from core.tokenization import encode
from tests.tiny_models import TEXT
from tests.tiny_pipeline import tiny_model
from tests.tiny_training import read_metrics, settings, write_run
from training.__main__ import main
from training.pretrain import INSTRUCTIONS, Kind, make_text_example

LINES = [line for line in TEXT.splitlines() if line]


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Model:
    return tiny_model(tiny_llama)


def test_autoencoding_asks_for_the_compressed_chunk_itself(model: Model) -> None:
    text = Passage(" ".join(LINES[:3]), title="Rhine")
    example = make_text_example(model, text, "autoencoding", 1000, random.Random(1))
    (compressed,) = example.request.passages
    assert compressed.content in text.content
    assert len(example.rows) == 1
    assert example.questions[0].answer_ids == model.template.answer_ids(compressed.content)
    assert example.request.query in INSTRUCTIONS["autoencoding"]
    assert example.relevance is None


def test_continuation_asks_for_what_follows_the_chunk(model: Model) -> None:
    text = Passage(" ".join(LINES[:3]))
    seen = set()
    for seed in range(10):
        example = make_text_example(model, text, "continuation", 12, random.Random(seed))
        (compressed,) = example.request.passages
        following = text.content.partition(compressed.content)[2]
        (question,) = example.questions
        assert question.answer_ids == encode(model.generator.tokenizer, following).ids[:12]
        assert model.template.end_id not in question.answer_ids
        seen.add(compressed.content)
    assert len(seen) > 1


def test_a_text_of_one_chunk_is_repeated(model: Model) -> None:
    example = make_text_example(model, Passage("Bread."), "continuation", 12, random.Random(0))
    assert example.questions[0].answer_ids == model.template.answer_ids("Bread.")


def test_a_chunk_of_nothing_but_line_breaks_is_not_asked_for(model: Model) -> None:
    text = Passage("Bread." + " \n" * 400 + "Salt.")
    kinds: tuple[Kind, ...] = ("autoencoding", "continuation")
    for kind, seed in itertools.product(kinds, range(10)):
        example = make_text_example(model, text, kind, 12, random.Random(seed))
        assert example.request.passages[0].text.strip() in ("Bread.", "Salt.")
        assert example.questions[0].answer_ids


def test_train_goes_on_from_a_pretrained_encoder(
    tiny_llama: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = {"epochs": 4, "eval_every": 4, "micro_batch_tokens": 2000}
    values = settings(tiny_llama, tiny_bert, compressor={"readout": "memory"}, loop=loop)
    config = write_run(tmp_path, values)
    texts = tmp_path / "texts.jsonl.gz"
    with gzip.open(texts, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"title": f"t{number}", "text": line}) + "\n" for number, line in enumerate(LINES))
        file.write('{"title": "no text"}\n{broken\n')
    data = [f"data.train={texts}", f"data.dev={texts}", "data.answer_tokens=24"]
    assert main(["pretrain", str(config), "--out", str(tmp_path / "texts"), *data]) == 0
    assert f"{len(LINES)} of {len(LINES) + 2} rows kept" in capsys.readouterr().out
    first, *_, last = read_metrics(tmp_path / "texts", "dev")
    assert all(last[name] < first[name] for name in ("loss_autoencoding", "loss_continuation"))
    # One step at next to no rate: what is saved is what it began from.
    still = ["loop.max_steps=1", "optimizer.compressor_lr=1e-12", "optimizer.generator_lr=1e-12"]
    assert main(["train", str(config), "--out", str(tmp_path / "run"), f"start={tmp_path}/texts/best", *still]) == 0
    for name in ("compressor.safetensors", "adapter.safetensors"):
        before, after = (load_file(tmp_path / folder / name) for folder in ("texts/best", "run/last"))
        assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before | after)


def test_texts_over_the_prompt_limit_are_skipped_and_counted(tiny_llama: Path, tmp_path: Path) -> None:
    config, texts = write_run(tmp_path, settings(tiny_llama)), tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES), encoding="utf-8")
    data = [f"data.train={texts}", f"data.dev={texts}", "data.answer_tokens=200", "data.autoencoding=1.0"]
    assert main(["pretrain", str(config), "--out", str(tmp_path / "out"), *data, "data.prompt_tokens=116"]) == 0
    skipped = json.loads((tmp_path / "out/last/progress.json").read_text())["skipped"]
    assert 0 < skipped < len(LINES)


def test_without_an_answer_loss_there_is_nothing_to_pretrain(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_run(tmp_path, settings(tiny_llama, loss={"answer": 0.0}))
    assert main(["pretrain", str(config), "--out", str(tmp_path / "out")]) == 1
    assert "loss.answer" in capsys.readouterr().err
