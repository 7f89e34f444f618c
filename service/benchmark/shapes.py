"""What the shapes allow: the operations a run must do, from lengths and widths alone. Runs no model.

No padding, nothing done twice, the vocabulary's head only where a token is wanted. Only the query is counted again for
every chunk, though a generator's first layers read it once for all chunks of a batch. What was counted while a run was
made stands beside it, so that waste shows. Attention is the whole square of positions, as it is counted.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from core.model import Model
from core.packed_linear import PackedLinear
from core.pipeline import PreparedRequest, rows_of
from core.readouts import PointerReadout
from core.rows import ChunkRow


def generator_flops(model: Model, prompt_tokens: int, new_tokens: int) -> int:
    """Operations of one answer: its prefill, and a decode step for every new token but the first."""
    network: Any = model.generator.model
    decoder = network.get_decoder()
    weights, attention = linear_weights(decoder), _attention_width(decoder.config)
    positions = range(prompt_tokens + 1, prompt_tokens + new_tokens)  # attended to by each decode step
    head = 2 * linear_weights(network.get_output_embeddings()) * new_tokens
    linear = 2 * weights * (prompt_tokens + len(positions))
    return linear + attention * (prompt_tokens**2 + sum(positions)) + head


def compressor_flops(model: Model, request: PreparedRequest, rate: int | None = None) -> int:
    """Operations of one request's compression, each chunk by itself."""
    backbone = model.compressor.backbone
    weights, attention = linear_weights(backbone), _attention_width(backbone.config)
    rows = rows_of(model, request, rate)
    lengths = [model.compressor.row_format.length(row) for row in rows]
    return sum(2 * weights * length + attention * length**2 for length in lengths) + _readout_flops(model, rows)


def linear_weights(module: nn.Module) -> int:
    """Weights that take part in matrix products with each position."""
    linears = (part for part in module.modules() if isinstance(part, nn.Linear | PackedLinear))
    return sum(part.in_features * part.out_features for part in linears)


def _attention_width(config: Any) -> int:
    """Operations per pair of positions: query by key and weight by value, all heads of all layers."""
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 4 * heads * head_dim * int(config.num_hidden_layers)


def _readout_flops(model: Model, rows: Sequence[ChunkRow]) -> int:
    readout = model.compressor.readout
    if not isinstance(readout, PointerReadout):
        memory = sum(row.memory_tokens for row in rows)
        return 2 * linear_weights(readout) * memory  # pooling itself is left out: it is less than a thousandth
    total = 0
    for row in rows:
        tokens, windows = len(row.chunk.generator_ids), -(-row.memory_tokens // readout.window)
        width, wide = readout.query.in_features, readout.residual.out_features
        total += 2 * readout.query.weight.numel() * (windows + tokens)  # query and key are of one shape
        total += 2 * readout.residual.weight.numel() * row.memory_tokens
        total += 2 * tokens * (windows * width + row.memory_tokens * wide)  # pointing, and reading what is pointed at
    return total
