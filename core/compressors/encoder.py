"""The `encoder` compressor: any bidirectional encoder, projected to the generator's width (OSCAR app. J)."""

from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from core.compressors.base import Compressor, check_longest_row
from core.config import CompressorConfig
from core.rows import encoder_row_format


class EncoderCompressor(Compressor):
    """Any `AutoModel` encoder (ModernBERT, BERT, MiniLM, RoBERTa); slots are read and written like masked tokens."""

    def __init__(
        self,
        config: CompressorConfig,
        encoder_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        generator_width: int,
    ) -> None:
        row_format = encoder_row_format(tokenizer, config)
        backbone = AutoModel.from_config(encoder_config)
        positions = _positions(backbone)
        check_longest_row(row_format, config, positions, "encoder")
        if hasattr(backbone, "pooler"):
            backbone.pooler = None  # a sentence head that nothing here reads
        super().__init__(config, backbone, tokenizer, row_format, generator_width)


def _positions(backbone: PreTrainedModel) -> int | None:
    """Positions an encoder can tell apart; None where its config names no limit."""
    positions: int | None = getattr(backbone.config, "max_position_embeddings", None)
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    if positions and isinstance(table, nn.Embedding) and table.padding_idx is not None:
        return positions - table.padding_idx - 1  # RoBERTa counts from behind its padding position
    return positions
