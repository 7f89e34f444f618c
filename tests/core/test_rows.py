"""Rows of compressor input: what stands where, and how rows are batched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.passages import Passage
from core.pipeline import prepare, rows_of
from core.rows import ChunkRow, RowBatch, collate_rows, plan_batches
from core.tokenization import encode
from tests.tiny_pipeline import PASSAGES, QUERY, tiny_model

ORDERS = ["query_first", "document_first"]


def rows_for(generator: Path, encoder: Path | None, order: Any) -> tuple[list[ChunkRow], RowBatch, Any]:
    model = tiny_model(generator, encoder, order=order, allocation="proportional")
    rows = rows_of(model, prepare(model, QUERY, PASSAGES))
    return rows, collate_rows(rows, model.compressor.row_format, 8), model


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["n_layers", "encoder"])
def test_every_position_holds_what_it_should(tiny_llama: Path, tiny_bert: Path, order: str, kind: str) -> None:
    rows, batch, model = rows_for(tiny_llama, tiny_bert if kind == "encoder" else None, order)
    tokenizer = model.compressor.tokenizer
    for i, row in enumerate(rows):
        texts = [row.query_ids, row.chunk.compressor_ids]
        names = ["Query:\n", "\nDocument:\n"]
        if order == "document_first":
            texts.reverse()
            names = ["Document:\n", "\nQuery:\n"]
        if kind == "encoder":
            around = [[tokenizer.cls_token_id], [tokenizer.sep_token_id], [tokenizer.sep_token_id]]
        else:
            head, joint, tail = (encode(tokenizer, name).ids for name in (*names, "\n"))
            around = [[tokenizer.bos_token_id, *head], joint, tail]
        first = around[0] + texts[0] + around[1]
        tokens = first + texts[1] + around[2]
        length, count = model.compressor.row_format.length(row), row.memory_tokens
        assert length == len(tokens) + count + 1
        assert batch.ids[i].tolist() == tokens + [0] * (batch.ids.shape[1] - len(tokens))
        assert batch.slots[i, :length].tolist() == [-1] * len(tokens) + list(range(count)) + [8]
        assert batch.slots[i, length:].tolist() == [-1] * (batch.ids.shape[1] - length)
        assert batch.segments[i, :length].tolist() == [0] * len(first) + [1] * (length - len(first))
        assert batch.mask[i].tolist() == [True] * length + [False] * (batch.ids.shape[1] - length)
        assert batch.memory_positions[i, :count].tolist() == list(range(len(tokens), length - 1))
        assert batch.memory_mask[i].sum() == count
        assert batch.memory_mask[i, :count].all()
        assert batch.relevance_position[i] == length - 1


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["n_layers", "encoder"])
def test_chunk_positions_lead_to_the_covering_tokens(tiny_llama: Path, tiny_bert: Path, order: str, kind: str) -> None:
    rows, batch, _ = rows_for(tiny_llama, tiny_bert if kind == "encoder" else None, order)
    for i, row in enumerate(rows):
        count = len(row.chunk.generator_ids)
        covering = [row.chunk.compressor_ids[index] for index in row.chunk.compressor_index]
        assert batch.ids[i, batch.chunk_positions[i, :count]].tolist() == covering
        assert batch.generator_ids[i, :count].tolist() == row.chunk.generator_ids
        assert batch.generator_mask[i].tolist() == [j < count for j in range(batch.generator_mask.shape[1])]


def test_rows_are_ragged_in_their_memory(tiny_llama: Path) -> None:
    rows, batch, _ = rows_for(tiny_llama, None, "query_first")
    counts = [row.memory_tokens for row in rows]
    assert len(set(counts)) > 2
    assert batch.memory_mask.sum(1).tolist() == counts
    assert batch.memory_mask.shape[1] == max(counts)


def test_padding_only_widens_the_positions(tiny_llama: Path) -> None:
    rows, batch, model = rows_for(tiny_llama, None, "query_first")
    wide = collate_rows(rows, model.compressor.row_format, 8, pad_to=batch.ids.shape[1] + 9)
    assert wide.ids.shape == (len(rows), batch.ids.shape[1] + 9)
    assert torch.equal(wide.ids[:, :-9], batch.ids)
    assert not wide.mask[:, -9:].any()
    assert torch.equal(wide.memory_positions, batch.memory_positions)
    assert collate_rows(rows, model.compressor.row_format, 8, pad_to=1).ids.shape == batch.ids.shape


def test_a_batch_moves_whole(tiny_llama: Path) -> None:
    _, batch, _ = rows_for(tiny_llama, None, "query_first")
    moved = batch.to(torch.device("meta"))
    assert {value.device.type for value in vars(moved).values()} == {"meta"}
    assert moved.ids.shape == batch.ids.shape


def test_a_query_the_encoder_cannot_see_leaves_a_row(tiny_llama: Path, tiny_bert: Path) -> None:
    model = tiny_model(tiny_llama, tiny_bert)
    (row,) = rows_of(model, prepare(model, "\u200b", [Passage("Bread.")]))
    assert row.query_ids == []
    batch = collate_rows([row], model.compressor.row_format, 8)
    assert model.compressor(batch, model.generator.embed).scores.isfinite().all()


@given(lengths=st.lists(st.integers(1, 300), max_size=60), budget=st.integers(1, 1000))
def test_batches_hold_each_row_once_and_keep_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan_batches(lengths, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        positions = len(batch) * max(lengths[index] for index in batch)
        assert len(batch) == 1 or positions <= budget
        assert positions - sum(lengths[index] for index in batch) <= 0.1 * positions + 1e-6
    # Of like length: no row of a later batch is longer than one of an earlier.
    flat = [lengths[index] for batch in batches for index in batch]
    assert flat == sorted(flat, reverse=True)


def test_batches_are_full() -> None:
    assert [len(batch) for batch in plan_batches([10] * 25, 100)] == [10, 10, 5]
    assert plan_batches([], 100) == []
