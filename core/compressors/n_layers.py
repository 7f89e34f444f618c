"""The `n_layers` compressor: an own copy of the generator's embeddings and first N layers (OSCAR sec. 3.1)."""

import copy

from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedTokenizerBase

from core.compressors.base import Compressor
from core.config import CompressorConfig
from core.errors import ConfigError
from core.rows import causal_row_format


class NLayersCompressor(Compressor):
    """First N layers of any Llama-shaped decoder (Llama, Mistral, Qwen2/3, SmolLM), without the final norm."""

    causal = True

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
        backbone = AutoModel.from_config(first_layers_config(base_config, config.n_layers))
        if not all(hasattr(backbone, part) for part in ("embed_tokens", "layers", "norm")):
            raise ConfigError(f"compressor.kind: n_layers cannot copy layers of a {base_config.model_type} model")
        # The embeddings are the raw residual stream: a final norm trained for the last layer would distort it.
        backbone.norm = nn.Identity()
        super().__init__(config, backbone, tokenizer, causal_row_format(tokenizer, config), generator_width)


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
