"""Readouts against hand-made results."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from core.config import CompressorConfig
from core.readouts import MemoryReadout, PointerReadout, PooledReadout, build_readout, take
from core.rows import RowBatch

WIDTH = 8
TABLE = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(0))


def embed(ids: Tensor) -> Tensor:
    return TABLE[ids]


def batch_of(memory: list[int], tokens: list[int]) -> RowBatch:
    """Rows `[chunk][slots][RR]` whose chunks have `tokens` tokens and get `memory` embeddings."""
    size, most_memory, most_tokens = len(memory), max(memory), max(tokens)
    width = max(m + t for m, t in zip(memory, tokens, strict=True)) + 1
    counts, lengths = torch.tensor(memory).view(-1, 1), torch.tensor(tokens).view(-1, 1)
    slot, token = torch.arange(most_memory), torch.arange(most_tokens)
    return RowBatch(
        ids=torch.zeros(size, width, dtype=torch.int64),
        mask=torch.arange(width) < counts + lengths + 1,
        segments=torch.zeros(size, width, dtype=torch.int64),
        slots=torch.full((size, width), -1),
        memory_positions=(lengths + slot) * (slot < counts),
        memory_mask=slot < counts,
        relevance_position=(counts + lengths).squeeze(1),
        chunk_positions=token * (token < lengths),
        generator_ids=torch.randint(1, 50, (size, most_tokens), generator=torch.Generator().manual_seed(1)),
        generator_mask=token < lengths,
    )


def hidden_for(batch: RowBatch, seed: int = 2) -> Tensor:
    return torch.randn(*batch.ids.shape, WIDTH, generator=torch.Generator().manual_seed(seed))


def pointing_at(batch: RowBatch, starts: list[list[int]], window: int) -> Tensor:
    """Hidden states with which `sharp_pointer` points window w of row b at token starts[b][w]."""
    hidden = torch.zeros(*batch.ids.shape, 64)
    for row, row_starts in enumerate(starts):
        for token in range(int(batch.generator_mask[row].sum())):
            hidden[row, batch.chunk_positions[row, token], token] = 1
        for index, start in enumerate(row_starts):
            hidden[row, batch.memory_positions[row, index * window], start] = 1
    return hidden


def sharp_pointer(window: int, lead: int) -> PointerReadout:
    readout = PointerReadout(64, WIDTH, window, lead)
    for layer in (readout.query, readout.key):
        nn.init.zeros_(layer.bias)
        layer.weight.data = 60 * torch.eye(64)
    return readout


def test_memory_is_the_hidden_state_at_each_slot() -> None:
    batch = batch_of(memory=[2, 3], tokens=[5, 4])
    hidden = hidden_for(batch)
    memory = MemoryReadout(nn.Identity())(hidden, batch, embed).memory
    assert torch.equal(memory[0, :2], hidden[0, 5:7])
    assert torch.equal(memory[1], hidden[1, 4:7])


def test_take_picks_rows_by_position() -> None:
    hidden = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(
        take(hidden, torch.tensor([[3, 0], [1, 1]])), torch.stack([hidden[0, [3, 0]], hidden[1, [1, 1]]])
    )


@given(sizes=st.lists(st.integers(1, 20).flatmap(lambda t: st.tuples(st.integers(1, t), st.just(t))), min_size=1))
def test_pooled_is_the_mean_of_equal_segments(sizes: list[tuple[int, int]]) -> None:
    memory, tokens = map(list, zip(*sizes, strict=True))
    batch = batch_of(memory, tokens)
    hidden = hidden_for(batch)
    output = PooledReadout(nn.Identity())(hidden, batch, embed)
    assert output.weights is not None
    for row, (count, length) in enumerate(sizes):
        bounds = [-(-i * length // count) for i in range(count + 1)]
        assert max(b - a for a, b in pairwise(bounds)) <= -(-length // count)
        for i in range(count):
            expected = hidden[row, bounds[i] : bounds[i + 1]].mean(0)
            torch.testing.assert_close(output.memory[row, i], expected, atol=1e-5, rtol=1e-5)
        # Each token is in exactly one segment; no weight falls on padding.
        assert ((output.weights[row] > 0).sum(0)[:length] == 1).all()
        assert not output.weights[row, :, length:].any()
        torch.testing.assert_close(output.weights[row, :count].sum(-1), torch.ones(count))


@pytest.mark.parametrize("lead", [0, 1, 3])
def test_a_sharp_pointer_copies_the_window_from_its_start(lead: int) -> None:
    batch = batch_of(memory=[8, 4], tokens=[20, 12])
    starts = [[5, 13], [6]]
    output = sharp_pointer(window=4, lead=lead)(pointing_at(batch, starts, 4), batch, embed)
    assert output.logits is not None
    for row, row_starts in enumerate(starts):
        assert output.logits[row].argmax(-1)[: len(row_starts)].tolist() == row_starts
        for index, start in enumerate(row_starts):
            wanted = batch.generator_ids[row, start - lead : start - lead + 4]
            torch.testing.assert_close(output.memory[row, 4 * index : 4 * index + 4], embed(wanted))


def test_pointers_that_agree_read_different_places() -> None:
    """The second window reads the next best place that the first has not read."""
    batch = batch_of(memory=[12, 8], tokens=[20, 6])
    hidden = pointing_at(batch, [[5, 5, 5], [2, 2]], 4)
    hidden[0, batch.memory_positions[0, ::4], 14] = 0.5
    hidden[0, batch.memory_positions[0, ::4], 7] = 0.8  # inside the first window
    output = sharp_pointer(window=4, lead=0)(hidden, batch, embed)
    assert output.logits is not None
    assert output.weights is not None
    assert output.logits[0].argmax(-1).tolist()[:2] == [5, 14]
    starts = output.weights[0, ::4].argmax(-1).tolist()
    assert starts[:2] == [5, 14]
    assert min(abs(starts[2] - start) for start in starts[:2]) >= 4
    # Row 1: the first window leaves no place in six tokens that does not overlap it.
    assert output.weights[1, :8:4].argmax(-1).tolist() == [2, 2]


def test_a_window_begins_where_a_token_of_the_compressor_begins() -> None:
    """The digits of a year are four tokens for the generator and one for the compressor: rounding must not choose."""
    batch = batch_of(memory=[4, 4], tokens=[12, 8])
    batch.chunk_positions[0, 5:9] = 5
    batch.chunk_positions[1, 0:2] = 0
    readout, hidden = sharp_pointer(window=4, lead=0), torch.zeros(*batch.ids.shape, 64)
    for row, place in enumerate((5, 0)):
        hidden[row, place, 7] = hidden[row, batch.memory_positions[row, 0], 7] = 1
    output = readout(hidden, batch, embed)
    assert output.logits is not None
    assert output.weights is not None
    assert output.weights[:, 0].argmax(-1).tolist() == [5, 0]
    assert output.logits[0, 0].isfinite().tolist() == [True] * 6 + [False] * 3 + [True] * 3
    assert output.logits[1, 0].isfinite().tolist() == [True, False] + [True] * 6 + [False] * 4


def test_a_pointer_reads_one_place_and_learns_from_all() -> None:
    batch = batch_of([4], [12])
    readout, hidden = PointerReadout(WIDTH, WIDTH, 4, 1), hidden_for(batch).requires_grad_()
    output = readout(hidden, batch, embed)
    assert output.weights is not None
    assert set(output.weights.flatten().tolist()) == {0.0, 1.0}
    with torch.inference_mode():
        assert torch.equal(readout(hidden, batch, embed).memory, output.memory)
    (output.memory * torch.randn(output.memory.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert readout.query.weight.grad is not None
    assert readout.query.weight.grad.abs().max() > 1e-6


def test_a_chunk_of_one_token_is_read_whole() -> None:
    batch = batch_of([1, 1], [1, 1])
    output = PointerReadout(WIDTH, WIDTH, 4, 0)(hidden_for(batch), batch, embed)
    torch.testing.assert_close(output.memory, embed(batch.generator_ids))


def test_a_window_past_either_end_of_the_chunk_reads_nothing_there() -> None:
    batch = batch_of(memory=[4, 4], tokens=[6, 12])
    output = sharp_pointer(window=4, lead=1)(pointing_at(batch, [[5], [0]], 4), batch, embed)
    assert output.weights is not None
    # Row 0: tokens 4 and 5, then over the end, which is padding here. Row 1: before the beginning, then 0, 1, 2.
    torch.testing.assert_close(output.memory[0, :2], embed(batch.generator_ids[0, 4:6]))
    assert not output.memory[0, 2:].any()
    assert not output.memory[1, 0].any()
    torch.testing.assert_close(output.memory[1, 1:], embed(batch.generator_ids[1, :3]))
    assert not output.weights[0, :, 6:].any()


@given(window=st.integers(1, 9), lead=st.integers(0, 12), memory=st.integers(1, 12), extra=st.integers(0, 9))
def test_pointer_weights_are_parts_of_the_chunk(window: int, lead: int, memory: int, extra: int) -> None:
    batch = batch_of([memory, 1], [memory + extra, 3])
    readout = PointerReadout(WIDTH, WIDTH, window, lead)
    output = readout(hidden_for(batch), batch, embed)
    assert output.weights is not None
    assert output.logits is not None
    assert output.weights.shape == (2, memory, batch.generator_mask.shape[1])
    assert output.logits.shape == (2, -(-memory // window), batch.generator_mask.shape[1])
    assert (output.weights >= 0).all()
    assert (output.weights.sum(-1) <= 1 + 1e-5).all()
    assert not output.weights.masked_select(~batch.generator_mask.unsqueeze(1)).any()
    # The slot that reads the start itself has lost nothing.
    at_start = output.weights[0, readout.lead :: window]
    torch.testing.assert_close(at_start.sum(-1), torch.ones(len(at_start)))
    # The residual is zero at first: memory is nothing but embeddings.
    torch.testing.assert_close(output.memory, output.weights @ embed(batch.generator_ids))


def test_spread_shifts_the_start_to_the_right() -> None:
    starts = torch.tensor([[[0.0, 0.25, 0.75, 0.0, 0.0]]])
    weights = PointerReadout(WIDTH, WIDTH, 3, 1).spread(starts)
    assert weights.tolist() == [[[0.25, 0.75, 0.0, 0.0, 0.0], [0.0, 0.25, 0.75, 0.0, 0.0], [0.0, 0.0, 0.25, 0.75, 0.0]]]


def test_the_residual_adds_the_projected_slot() -> None:
    batch = batch_of([3], [7])
    readout, hidden = PointerReadout(WIDTH, WIDTH, 2, 0), hidden_for(batch)
    before = readout(hidden, batch, embed).memory
    nn.init.normal_(readout.residual.weight)
    added = readout(hidden, batch, embed).memory - before
    torch.testing.assert_close(added[0], readout.residual(hidden[0, 7:10]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["n_layers", "encoder"])
def test_only_an_encoder_is_projected(kind: str) -> None:
    base = {"base_model": "some-encoder"} if kind == "encoder" else {}
    for readout, made in (("memory", MemoryReadout), ("pooled", PooledReadout)):
        config = CompressorConfig(kind=kind, readout=readout, projection_dim=32, **base)  # type: ignore[arg-type]  # str
        built = build_readout(config, 12, WIDTH)
        assert isinstance(built, made)
        shapes = [tuple(weight.shape) for weight in built.parameters()]
        assert shapes == ([(32, 12), (32,), (WIDTH, 32), (WIDTH,)] if kind == "encoder" else [])
