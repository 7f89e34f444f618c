"""Compressor input: one row a chunk, `[query][chunk][MEM_1..MEM_l][RR]`, padded and batched. Knows no weights."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.config import CompressorConfig
from core.passages import Chunk
from core.tokenization import encode, leading_special_ids, pair_special_ids

MAX_PADDING = 0.1  # of a batch's positions: less would make more passes of fewer rows


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """One row of compressor input: a chunk, the query it is read for, and how many embeddings it is to become."""

    query_ids: list[int]
    chunk: Chunk
    memory_tokens: int


@dataclass(frozen=True)
class RowFormat:
    """The fixed tokens around the two texts of a row: `head first joint second tail`, then the slots."""

    head: list[int]
    joint: list[int]
    tail: list[int]
    query_first: bool

    def prefix(self, row: ChunkRow) -> list[int]:
        """The tokens before a row's second text: the same for all rows that have the first text in common."""
        return [*self.head, *(row.query_ids if self.query_first else row.chunk.compressor_ids), *self.joint]

    def length(self, row: ChunkRow) -> int:
        """Tokens of a row with its slots, unpadded."""
        fixed = len(self.head) + len(self.joint) + len(self.tail)
        return fixed + len(row.query_ids) + len(row.chunk.compressor_ids) + row.memory_tokens + 1

    def longest(self, config: CompressorConfig) -> int:
        """Tokens of the longest row that `config` allows, with its slots."""
        fixed = len(self.head) + len(self.joint) + len(self.tail)
        return fixed + config.query_tokens + config.chunk_tokens + config.max_memory_tokens + 1


@dataclass(frozen=True)
class RowBatch:
    """Padded rows. B rows, T positions, L memory tokens at most, G generator tokens of a chunk at most.

    ids                 (B, T) int64, 0 at slots and padding
    mask                (B, T) bool, true where a token or slot stands; padding is on the right
    segments            (B, T) int64, 0 for the first text and 1 from the second on (token types of BERT-likes)
    slots               (B, T) int64: -1 at tokens and padding, i at [MEM_i], the number of memory slots at [RR]
    memory_positions    (B, L) int64, where each memory token stands; `memory_mask` (B, L) bool says which exist
    relevance_position  (B,) int64, where [RR] stands
    chunk_positions     (B, G) int64, where the compressor token that covers each generator token stands
    generator_ids       (B, G) int64, the chunk in generator tokens; `generator_mask` (B, G) bool
    """

    ids: Tensor
    mask: Tensor
    segments: Tensor
    slots: Tensor
    memory_positions: Tensor
    memory_mask: Tensor
    relevance_position: Tensor
    chunk_positions: Tensor
    generator_ids: Tensor
    generator_mask: Tensor

    def to(self, device: torch.device) -> "RowBatch":
        """The same batch on `device`."""
        moved = {field.name: getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)}
        return replace(self, **moved)


def causal_row_format(tokenizer: PreTrainedTokenizerBase, config: CompressorConfig) -> RowFormat:
    """Row format of a causal compressor: both texts announced in words, as in the paper's code."""
    query_first = config.order == "query_first"
    names = ("Query:\n", "\nDocument:\n") if query_first else ("Document:\n", "\nQuery:\n")
    head, joint = (encode(tokenizer, name).ids for name in names)
    return RowFormat(leading_special_ids(tokenizer) + head, joint, encode(tokenizer, "\n").ids, query_first)


def encoder_row_format(tokenizer: PreTrainedTokenizerBase, config: CompressorConfig) -> RowFormat:
    """Row format of an encoder: `[CLS] first [SEP] second [SEP]`, the tokenizer's own pair format."""
    head, joint, tail = pair_special_ids(tokenizer)
    return RowFormat(head, joint, tail, config.order == "query_first")


def collate_rows(
    rows: Sequence[ChunkRow], row_format: RowFormat, memory_slots: int, pad_to: int | None = None
) -> RowBatch:
    """Stack rows of any lengths into one padded batch; `pad_to` asks for more padding than the longest row needs."""
    lengths = [row_format.length(row) for row in rows]
    size, width = len(rows), max(pad_to or 0, *lengths)
    most_memory = max(row.memory_tokens for row in rows)
    most_tokens = max(len(row.chunk.generator_ids) for row in rows)
    ids, segments = np.zeros((2, size, width), dtype=np.int64)
    slots = np.full((size, width), -1, dtype=np.int64)
    memory_positions = np.zeros((size, most_memory), dtype=np.int64)
    chunk_positions, generator_ids = np.zeros((2, size, most_tokens), dtype=np.int64)
    for i, row in enumerate(rows):
        chunk = row.chunk
        texts = (row.query_ids, chunk.compressor_ids)
        first, second = texts if row_format.query_first else texts[::-1]
        tokens = [*row_format.head, *first, *row_format.joint, *second, *row_format.tail]
        second_start = len(row_format.head) + len(first) + len(row_format.joint)
        chunk_start = second_start if row_format.query_first else len(row_format.head)
        end, count = len(tokens), row.memory_tokens
        ids[i, :end] = tokens
        segments[i, second_start : end + count + 1] = 1
        slots[i, end : end + count] = np.arange(count)
        slots[i, end + count] = memory_slots
        memory_positions[i, :count] = np.arange(end, end + count)
        chunk_positions[i, : len(chunk.compressor_index)] = np.add(chunk.compressor_index, chunk_start)
        generator_ids[i, : len(chunk.generator_ids)] = chunk.generator_ids
    rows_memory = np.asarray([row.memory_tokens for row in rows])
    rows_tokens = np.asarray([len(row.chunk.generator_ids) for row in rows])
    return RowBatch(
        ids=torch.from_numpy(ids),
        mask=torch.from_numpy(np.arange(width) < np.asarray(lengths)[:, None]),
        segments=torch.from_numpy(segments),
        slots=torch.from_numpy(slots),
        memory_positions=torch.from_numpy(memory_positions),
        memory_mask=torch.from_numpy(np.arange(most_memory) < rows_memory[:, None]),
        relevance_position=torch.from_numpy(np.asarray(lengths) - 1),
        chunk_positions=torch.from_numpy(chunk_positions),
        generator_ids=torch.from_numpy(generator_ids),
        generator_mask=torch.from_numpy(np.arange(most_tokens) < rows_tokens[:, None]),
    )


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group rows of like length: no padded batch holds more than `max_tokens` positions, or more padding than
    `MAX_PADDING` of them.

    Returns indices into `lengths`, each exactly once; a row longer than the budget gets a batch of its own.
    """
    batches: list[list[int]] = []
    width = real = 0  # of the last batch: its first row's length, and the sum of all of its rows'
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # longest first
        length = lengths[index]
        padded = width * (len(batches[-1]) + 1) if batches else 0
        if batches and padded <= max_tokens and real + length >= (1 - MAX_PADDING) * padded:
            batches[-1].append(index)
            real += length
        else:
            batches.append([index])
            width = real = length
    return batches
