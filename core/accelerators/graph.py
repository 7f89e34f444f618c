"""The compressor as a graph of fixed shapes: positional tensors in, a tuple of tensors out, no step that depends on
values. Knows no accelerator.

Rules that Neuron's compiler and XLA set: attention in the plain ("eager") form, with our own additive mask; examples
with padding, or the mask is taken for a constant and dropped; no boolean indexing, no division of integers.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from core.accelerators.buckets import Bucket
from core.compressors import Compressor, CompressorOutput
from core.errors import ConfigError
from core.passages import Chunk
from core.readouts import Embed
from core.rows import ChunkRow, RowBatch, collate_rows

# Added to logits that must not count. exp(-1e4) is 0 in every type, and sums stay finite: with the type's lowest
# number they become minus infinity in bfloat16, and NaN from there.
MASKED = -1e4
NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")  # of a model's config
EMBEDDED = "token_embeddings"  # of the chunk's generator tokens, looked up by the generator on the host


class CompressorGraph(nn.Module):
    """A compressor over one static batch. `inputs` names the tensors it takes, in order; all of them matter.

    Outputs: memory (B, L, d_generator), scores (B,) float32, and weights (B, L, G) float32 where the readout has them;
    L and G are the most that the checkpoint's settings allow. Weights are shared with `compressor`, which stays as is.
    """

    def __init__(self, compressor: Compressor) -> None:
        super().__init__()
        self.compressor = _with_plain_attention(compressor)
        self.inputs = graph_inputs(compressor)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Compress; `tensors` as `inputs` names them."""
        given = dict(zip(self.inputs, tensors, strict=True))
        # A field that this compressor does not read stays unbound: reading it would fail, not give a wrong number.
        batch = RowBatch(**{field.name: given.get(field.name) for field in fields(RowBatch)})  # type: ignore[arg-type]
        masks = additive_masks(self.compressor, batch.mask)
        hidden = self.compressor.hidden(batch, masks)
        output = self.compressor.read(hidden, batch, lambda _: given[EMBEDDED])
        return tuple(each for each in (output.memory, output.scores, output.weights) if each is not None)


def graph_inputs(compressor: Compressor) -> tuple[str, ...]:
    """The fields of `RowBatch` that `compressor` reads, and `token_embeddings` for a pointer."""
    names = ["ids", "mask", "slots", "relevance_position"]
    if compressor.takes_segments:
        names.append("segments")
    if compressor.config.readout in ("memory", "pointer"):
        names.append("memory_positions")
    if compressor.config.readout in ("pooled", "pointer"):
        names += ["chunk_positions", "generator_mask"]
    if compressor.config.readout == "pooled":
        names.append("memory_mask")
    if compressor.config.readout == "pointer":
        names.append(EMBEDDED)
    return tuple(names)


def additive_masks(compressor: Compressor, mask: Tensor) -> Tensor | dict[str, Tensor]:
    """Which positions see which, for `mask` (B, T): (B, 1, T, T) or (B, 1, 1, T), by kind of layer if they differ."""
    config = compressor.backbone.config
    position = torch.arange(mask.shape[1], device=mask.device)
    distance = position.unsqueeze(1) - position  # (T, T): how far back a key stands
    allowed = mask[:, None, None, :]  # (B, 1, 1, T)
    window: int | None = getattr(config, "sliding_window", None)
    if compressor.causal:
        allowed = allowed & (distance >= 0)
        near = distance < (window or mask.shape[1])
    else:
        near = distance.abs() <= (window or mask.shape[1])
    full = _additive(allowed, compressor.slots.dtype)
    sliding = full if window is None else _additive(allowed & near, compressor.slots.dtype)
    kinds: Sequence[str] = getattr(config, "layer_types", None) or ()
    if kinds:
        return {kind: sliding if kind == "sliding_attention" else full for kind in set(kinds)}
    return sliding


def static_batch(batch: RowBatch, compressor: Compressor, bucket: Bucket) -> RowBatch:
    """`batch`, whose rows are padded to the bucket's length already, with the bucket's other sizes.

    Rows that are missing repeat the first one: a row of nothing but padding has nothing to attend to.
    """
    config = compressor.config
    widths = dict.fromkeys(("memory_positions", "memory_mask"), config.max_memory_tokens)
    widths |= dict.fromkeys(("chunk_positions", "generator_ids", "generator_mask"), config.chunk_tokens)
    rows = torch.arange(bucket.rows)
    rows = torch.where(rows < len(batch.ids), rows, 0)
    padded: dict[str, Tensor] = {}
    for name in (field.name for field in fields(RowBatch)):
        value: Tensor = getattr(batch, name)[rows]
        if name in widths:
            value = functional.pad(value, (0, widths[name] - value.shape[1]))
        padded[name] = value
    return RowBatch(**padded)


def graph_tensors(batch: RowBatch, inputs: Sequence[str], embed: Embed) -> tuple[Tensor, ...]:
    """A static batch as `CompressorGraph` takes it."""
    return tuple(embed(batch.generator_ids) if name == EMBEDDED else getattr(batch, name) for name in inputs)


def example_batch(compressor: Compressor, bucket: Bucket, first: int = 0) -> RowBatch:
    """A static batch of rows of several lengths, all of them padded; `first` is the number of its first row.

    Raises ConfigError for a bucket that is too short for any row.
    """
    rows = [_example_row(compressor, bucket, first + index) for index in range(bucket.rows)]
    if max(compressor.row_format.length(row) for row in rows) >= bucket.length:
        raise ConfigError(f"buckets: {bucket} is too short for a row of this compressor")
    batch = collate_rows(rows, compressor.row_format, compressor.config.max_memory_tokens, pad_to=bucket.length)
    return static_batch(batch, compressor, bucket)


def longest_row(compressor: Compressor) -> int:
    """Positions of the longest row that the compressor's settings allow."""
    return compressor.row_format.longest(compressor.config)


def as_output(tensors: Sequence[Tensor], rows: int) -> CompressorOutput:
    """A graph's outputs as the compressor's own, of the first `rows` rows. `logits` are for training, and left out."""
    memory, scores, *weights = (tensor[:rows] for tensor in tensors)
    return CompressorOutput(memory, scores, weights[0] if weights else None, None)


def _with_plain_attention(compressor: Compressor) -> Compressor:
    """A copy with the same parameters, whose attention is written out instead of fused."""
    shared: Mapping[int, object] = {id(parameter): parameter for parameter in compressor.parameters()}
    copied = copy.deepcopy(compressor, dict(shared) | {id(compressor.tokenizer): compressor.tokenizer})
    copied.backbone.set_attn_implementation("eager")
    return copied.eval()


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(allowed, 0.0, MASKED).to(dtype)


def _example_row(compressor: Compressor, bucket: Bucket, index: int) -> ChunkRow:
    """A row shorter than the bucket, the more so the higher its index."""
    config = compressor.config
    room = bucket.length - 1 - index % 8 * (bucket.length // 16)
    fixed = compressor.row_format.length(ChunkRow([], _chunk(0, []), 0))
    memory = max(1, min(config.max_memory_tokens, room - fixed - 2))
    query = max(1, min(config.query_tokens, (room - fixed - memory) // 3))
    chunk = max(1, min(config.chunk_tokens, room - fixed - memory - query))
    ids = [2 + (7919 * place + 104729 * index) % 500 for place in range(query + chunk)]
    return ChunkRow(ids[:query], _chunk(chunk, ids[query:]), min(memory, chunk))


def _chunk(tokens: int, ids: Sequence[int]) -> Chunk:
    """A chunk of `tokens` tokens that are the same in both vocabularies."""
    filled = [*ids, *[0] * tokens][:tokens]
    return Chunk(0, 0, tokens, filled, [(place, place + 1) for place in range(tokens)], filled, list(range(tokens)))
