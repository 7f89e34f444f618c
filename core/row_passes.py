"""Rows through a compressor in as few positions as their order allows: what is known of a row is not computed again.

Rows of one query begin alike where the query is read first, rows of one chunk where the chunk is. Knows no requests.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.compressors import Compressor, CompressorOutput, NLayersCompressor
from core.compressors.prefixes import Prefix
from core.document_cache import DocumentCache
from core.readouts import Embed
from core.rows import ChunkRow, RowBatch, collate_rows


@dataclass(frozen=True)
class RowPass:
    """One forward pass: which rows it held, in its order, and whether their chunks were known before."""

    indices: list[int]
    output: CompressorOutput
    warm: bool = False


def run_rows(
    compressor: Compressor, rows: Sequence[ChunkRow], embed: Embed, documents: DocumentCache | None = None
) -> Iterator[RowPass]:
    """Compress rows of any mix of requests; every row is in exactly one of the passes.

    documents   for an n_layers compressor that reads the chunk first: what it knows of chunks, added to by this call
    """
    everything = list(range(len(rows)))
    if isinstance(compressor, NLayersCompressor):
        if documents is not None:
            yield from _with_documents(compressor, rows, embed, documents)
            return
        if compressor.row_format.query_first and _saving(compressor, rows) >= compressor.least_saving:
            batch = _collate(compressor, rows)
            hidden = compressor.hidden_after(batch, _query_prefixes(compressor, rows))
            yield RowPass(everything, compressor.read(hidden, batch, embed))
            return
    yield RowPass(everything, compressor(_collate(compressor, rows), embed))


def _collate(compressor: Compressor, rows: Sequence[ChunkRow]) -> RowBatch:
    return collate_rows(rows, compressor.row_format, compressor.config.max_memory_tokens).to(compressor.device)


def _with_documents(
    compressor: NLayersCompressor, rows: Sequence[ChunkRow], embed: Embed, documents: DocumentCache
) -> Iterator[RowPass]:
    known = {i: prefix for i, row in enumerate(rows) if (prefix := documents.get(row)) is not None}
    cold = [i for i in range(len(rows)) if i not in known]
    if known:
        batch = _collate(compressor, [rows[i] for i in known])
        hidden = compressor.hidden_after(batch, list(known.values()))
        yield RowPass(list(known), compressor.read(hidden, batch, embed), warm=True)
    known.clear()  # what leaves the cache next must not live on here
    if cold:
        new = [rows[i] for i in cold]
        batch = _collate(compressor, new)
        hidden, recorder = compressor.record(batch.ids, batch.slots)
        documents.keep(new, recorder, hidden if compressor.reads_chunk else None)
        yield RowPass(cold, compressor.read(hidden, batch, embed))


def _saving(compressor: Compressor, rows: Sequence[ChunkRow]) -> float:
    """Share of the rows' positions that would be computed twice: queries that stand in several rows."""
    lengths = [len(compressor.row_format.prefix(row)) for row in rows]
    once = {tuple(row.query_ids): length for row, length in zip(rows, lengths, strict=True)}
    total = sum(compressor.row_format.length(row) for row in rows)
    return (sum(lengths) - sum(once.values())) / total


def _query_prefixes(compressor: NLayersCompressor, rows: Sequence[ChunkRow]) -> list[Prefix]:
    """For each row the prefix of its query; rows of one query share it."""
    distinct = {tuple(row.query_ids): compressor.row_format.prefix(row) for row in rows}
    ids = _pad(list(distinct.values()), compressor.device)
    _, recorder = compressor.record(ids, torch.full_like(ids, -1))
    prefixes = {
        query: recorder.prefix(i, len(prefix), None, compressor.device)
        for i, (query, prefix) in enumerate(distinct.items())
    }
    return [prefixes[tuple(row.query_ids)] for row in rows]


def _pad(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    padded = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(padded).to(device)
