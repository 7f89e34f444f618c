"""A compressor's rows through compiled graphs: grouped into buckets, padded, run, and unpadded. Knows no files."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from core.accelerators.base import Accelerator, Compiled, CompileSpec
from core.accelerators.buckets import Bucket, check_buckets, plan_passes
from core.accelerators.graph import (
    CompressorGraph,
    as_output,
    example_batch,
    graph_inputs,
    graph_tensors,
    longest_row,
    static_batch,
)
from core.compressors import Compressor, CompressorOutput
from core.readouts import Embed
from core.rows import ChunkRow, collate_rows


class AcceleratedCompressor:
    """Stands in for a compressor's forward pass over rows, on CPU tensors.

    buckets  the shapes there are
    passes   how often each was run
    """

    def __init__(self, compressor: Compressor, graphs: Mapping[Bucket, Compiled]) -> None:
        """Raises ConfigError where the longest row would fit no bucket."""
        check_buckets(list(graphs), longest_row(compressor))
        self._compressor = compressor
        self._graphs = dict(graphs)
        self._inputs = graph_inputs(compressor)
        self.passes: dict[Bucket, int] = dict.fromkeys(graphs, 0)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The shapes there are."""
        return tuple(self._graphs)

    @torch.inference_mode()
    def __call__(self, rows: Sequence[ChunkRow], embed: Embed) -> CompressorOutput:
        """Compress `rows`; outputs in their order, padded to the most that the settings allow."""
        row_format, slots = self._compressor.row_format, self._compressor.config.max_memory_tokens
        parts: list[CompressorOutput] = []
        order: list[int] = []
        for bucket, indices in plan_passes(self.buckets, [row_format.length(row) for row in rows]):
            batch = collate_rows([rows[i] for i in indices], row_format, slots, pad_to=bucket.length)
            static = static_batch(batch, self._compressor, bucket)
            parts.append(as_output(self.run(bucket, graph_tensors(static, self._inputs, embed)), len(indices)))
            order += indices
        back = torch.tensor(order).argsort()
        weights = [part.weights for part in parts if part.weights is not None]
        return CompressorOutput(
            torch.cat([part.memory for part in parts])[back],
            torch.cat([part.scores for part in parts])[back],
            torch.cat(weights)[back] if weights else None,
            None,
        )

    def run(self, bucket: Bucket, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One pass over inputs in `bucket`'s shapes."""
        self.passes[bucket] += 1
        return self._graphs[bucket](*inputs)

    def replace_weights(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of another `CompressorGraph` of the same shapes; nothing is compiled again."""
        for graph in self._graphs.values():
            graph.replace_weights(state)


def compile_compressor(
    compressor: Compressor,
    embed: Embed,
    accelerator: Accelerator,
    buckets: Sequence[Bucket],
    spec: CompileSpec | None = None,
) -> AcceleratedCompressor:
    """Compile one graph for each bucket. Raises ConfigError."""
    check_buckets(buckets, longest_row(compressor))
    graph = CompressorGraph(compressor)
    spec = spec or CompileSpec()
    graphs = {
        bucket: accelerator.compile(graph, graph_tensors(example_batch(compressor, bucket), graph.inputs, embed), spec)
        for bucket in buckets
    }
    return AcceleratedCompressor(compressor, graphs)
