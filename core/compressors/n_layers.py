"""The `n_layers` compressor: an own copy of the generator's embeddings and first N layers (OSCAR sec. 3.1)."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedTokenizerBase

from core.compressors.base import Compressor, check_longest_row
from core.compressors.prefixes import Continuation, Prefix, Recorder, at_positions, join_hidden, rest_positions
from core.config import CompressorConfig
from core.errors import ConfigError
from core.kv_slots import AttentionMasks, kv_shape
from core.rows import RowBatch, causal_row_format


class NLayersCompressor(Compressor):
    """First N layers of any Llama-shaped decoder (Llama, Mistral, Qwen2/3, SmolLM), without the final norm.

    least_saving    share of a batch's positions from which on queries are computed apart, once for all their rows: it
                    takes a small pass of its own, and attention under a mask
    """

    causal = True
    least_saving = 0.1

    def __init__(
        self,
        config: CompressorConfig,
        base_config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        generator_width: int,
    ) -> None:
        if config.n_layers > base_config.num_hidden_layers:
            raise ConfigError(
                f"compressor.n_layers: {config.n_layers} is over the generator's {base_config.num_hidden_layers} layers"
            )
        row_format = causal_row_format(tokenizer, config)
        check_longest_row(row_format, config, getattr(base_config, "max_position_embeddings", None), "generator")
        backbone = AutoModel.from_config(first_layers_config(base_config, config.n_layers))
        if not all(hasattr(backbone, part) for part in ("embed_tokens", "layers", "norm")):
            raise ConfigError(f"compressor.kind: n_layers cannot copy layers of a {base_config.model_type} model")
        # The embeddings are the raw residual stream: a final norm trained for the last layer would distort it.
        backbone.norm = nn.Identity()
        super().__init__(config, backbone, tokenizer, row_format, generator_width)

    def prefix_like(self, length: int) -> Prefix:
        """A prefix of `length` positions without its numbers, on the meta device."""
        config = self.backbone.config
        kv_heads, head_dim = kv_shape(config)
        shape = (config.num_hidden_layers, 2, kv_heads, length, head_dim)
        hidden = torch.empty(length, config.hidden_size, dtype=self.slots.dtype, device="meta")
        return Prefix(torch.empty(shape, dtype=self.slots.dtype, device="meta"), hidden if self.reads_chunk else None)

    def record(self, ids: Tensor, slots: Tensor) -> tuple[Tensor, Recorder]:
        """As `hidden`, of rows of `ids` and `slots` (B, T), and with it what a `Prefix` is made of."""
        recorder = Recorder()
        output = self.backbone(inputs_embeds=self.inputs(ids, slots), cache=recorder)
        return output.last_hidden_state, recorder

    def hidden_after(self, batch: RowBatch, prefixes: Sequence[Prefix]) -> Tensor:
        """As `hidden`, of rows whose first positions are known: one pass over the positions behind them.

        Returns (B, T, width), zeros at padding and, where the prefixes keep none, at their positions.
        """
        width = batch.ids.shape[1]
        lengths = (batch.relevance_position + 1).tolist()  # [RR] is the last of a row
        positions = rest_positions(lengths, prefixes, batch.ids.device)  # (B, S)
        past = Continuation(prefixes, positions)
        inputs = self.inputs(at_positions(batch.ids, positions, 0), at_positions(batch.slots, positions, -1))
        mask = AttentionMasks(self.backbone.config, inputs.dtype).between(positions, past.key_positions)
        output = self.backbone(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, cache=past)
        return join_hidden(prefixes, output.last_hidden_state, positions, width)


def first_layers_config(base_config: PretrainedConfig, n_layers: int) -> PretrainedConfig:
    """`base_config` cut to its first `n_layers` layers, without a K/V cache."""
    config = copy.deepcopy(base_config)
    config.num_hidden_layers = n_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:n_layers]
    config.use_cache = False
    return config


def first_layers_state(base: nn.Module, n_layers: int) -> dict[str, Tensor]:
    """Weights of `base` (a headless decoder) that its first `n_layers` layers need, by the backbone's names."""
    wanted = ("embed_tokens.", *(f"layers.{index}." for index in range(n_layers)))
    return {name: weight for name, weight in base.state_dict().items() if name.startswith(wanted)}
