"""Embedding models as they come: how they pool, and what they read of a long passage."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from core.errors import BaseModelError
from core.passages import Passage
from training.dense import MAX_TOKENS, DenseEncoder
from training.questions import Question
from training.rankers import EmbeddingRanker

TEXTS = ["The river rises in the Black Forest.", "Bread is made of flour."]


def test_a_sentence_encoder_pools_as_it_was_trained_to(tiny_bert: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_bert, tmp_path / "encoder")
    (folder / "1_Pooling").mkdir()

    def embedding(**modes: bool) -> torch.Tensor:
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, **modes}))
        with torch.inference_mode():
            return DenseEncoder(str(folder))(TEXTS)

    tokens = AutoTokenizer.from_pretrained(tiny_bert)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        first = AutoModel.from_pretrained(tiny_bert).eval()(**tokens)[0][:, 0]
    cls = embedding(pooling_mode_cls_token=True, pooling_mode_mean_tokens=False, include_prompt=True)
    torch.testing.assert_close(cls, torch.nn.functional.normalize(first, dim=-1))
    mean = embedding(pooling_mode_cls_token=False, pooling_mode_mean_tokens=True, include_prompt=True)
    with torch.inference_mode():
        torch.testing.assert_close(mean, DenseEncoder(str(tiny_bert))(TEXTS))  # the default
    with pytest.raises(BaseModelError, match="pools by lasttoken"):
        embedding(pooling_mode_lasttoken=True)


def test_an_embedding_model_reads_all_of_a_long_passage(tiny_bert: Path) -> None:
    query, filler = "When was the moon found?", "Bread is made of flour, water and salt. " * 60
    passages = [Passage(filler), Passage(filler + query)]
    (record,) = EmbeddingRanker(str(tiny_bert)).rank(Question("q", query, ("x",), tuple(passages), (False, True)), [2])
    assert record.scores[1] > record.scores[0]


def test_windows_cover_a_text_without_a_gap(tiny_bert: Path) -> None:
    encoder = DenseEncoder(str(tiny_bert))
    assert encoder.windows("Bread is made of flour.") == ["Bread is made of flour."]
    text = " ".join(f"Number {number} is a number." for number in range(200))
    windows = encoder.windows(text)
    assert len(windows) > 2
    assert "".join(windows).replace(" ", "") == text.replace(" ", "")
    assert max(len(ids) for ids in encoder.tokenizer(windows)["input_ids"]) <= MAX_TOKENS + 1
