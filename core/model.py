"""A loaded model: generator, compressor and the config that made them. Knows nothing about checkpoint folders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel

from core.base_models import BaseModel, resolve_base_model
from core.compressors import Compressor, CompressorOutput, EncoderCompressor, NLayersCompressor
from core.compressors.n_layers import first_layers_state
from core.config import Config
from core.decode_passes import DecodePasses
from core.document_cache import DocumentCache
from core.errors import ConfigError
from core.generator import Generator, load_generator, name_targets
from core.golden import Golden
from core.policy import TokenCosts
from core.pretrained import load_pretrained, read_config
from core.prompts import PromptTemplate
from core.readouts import Embed
from core.rows import ChunkRow
from core.tokenization import load_tokenizer


@dataclass
class Model:
    """Everything that serves one checkpoint version.

    name    the version that every response names; `untrained` for one built from base weights
    base    the generator's base model, with the sha256 of what was read
    accelerated     runs rows in the compressor's place (`core.accelerators`); None: the compressor itself does
    encoder_base    where an `encoder` compressor's weights came from; None for n_layers
    generator_graphs    passes of a new batch in the generator's place (`core.accelerators`); None: the generator's
    golden  its checkpoint's golden example
    quantized   whether its linear layers multiply in int8
    costs   what a token costs on this machine, for `auto` mode; None: not measured
    documents       what the compressor made of chunks, kept for other queries; None: nothing is kept
    """

    config: Config
    generator: Generator
    compressor: Compressor
    template: PromptTemplate
    base: BaseModel
    encoder_base: BaseModel | None = None
    name: str = "untrained"
    accelerated: Callable[[Sequence[ChunkRow], Embed], CompressorOutput] | None = None
    generator_graphs: Callable[[], DecodePasses] | None = None
    golden: Golden | None = None
    quantized: bool = False
    costs: TokenCosts | None = None
    documents: DocumentCache | None = None

    @property
    def number_format(self) -> str:
        """For people: "bfloat16", or "int8" where linear layers are quantised."""
        return "int8" if self.quantized else str(self.generator.dtype).removeprefix("torch.")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.compressor.device

    def decode_passes(self) -> DecodePasses | None:
        """What a new batch runs on instead of the generator, if there is anything."""
        return None if self.generator_graphs is None else self.generator_graphs()


def build_model(
    config: Config, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> Model:
    """A fresh model: base weights, and slots and heads that `seed` determines.

    In `text` mode it answers like the base model. Its config names the layers that an adapter is on. Raises
    BaseModelError and ConfigError.
    """
    if config.generator.merged:
        raise ConfigError("generator.merged: the weights of a merged generator are in its checkpoint, not in the base")
    base = resolve_base_model(config.generator.base_model)
    generator = load_generator(base, device=torch.device(device), dtype=dtype)
    if config.generator.lora is not None:
        lora = name_targets(generator.model, config.generator.lora)
        config = replace(config, generator=replace(config.generator, lora=lora))
    encoder_base = resolve_base_model(config.compressor.base_model) if config.compressor.kind == "encoder" else None
    compressor = build_compressor(config, generator, None if encoder_base is None else encoder_base.path, seed)
    if encoder_base is None:
        weights = first_layers_state(generator.model.base_model, config.compressor.n_layers)
        compressor.backbone.load_state_dict(weights, strict=True)
    else:
        compressor.backbone.load_state_dict(_encoder_state(encoder_base), strict=True)
    compressor.initialise_slots(torch.Generator().manual_seed(seed))
    place(compressor, torch.device(device), dtype)
    template = PromptTemplate(generator.tokenizer, config.prompt)
    return Model(config, generator, compressor, template, base, encoder_base)


def _encoder_state(base: BaseModel) -> dict[str, Tensor]:
    """Weights of an encoder, float32. Raises BaseModelError where transformers cannot load it."""
    loaded = load_pretrained(AutoModel, base, "an encoder", unneeded="pooler.", dtype=torch.float32)
    return {name: value for name, value in loaded.state_dict().items() if not name.startswith("pooler.")}


def place(compressor: Compressor, device: torch.device, dtype: torch.dtype) -> None:
    """Put the compressor on `device`, its weights as `dtype`, ready to serve.

    Only weights are converted: a backbone's rotary frequencies are buffers, and must stay float32.
    """
    compressor.to(device).eval()
    for parameter in compressor.parameters():
        parameter.data = parameter.data.to(dtype)


def build_compressor(config: Config, generator: Generator, folder: Path | None, seed: int = 0) -> Compressor:
    """The compressor's architecture with random float32 weights that `seed` determines.

    `folder` holds an encoder's config and tokenizer; None for n_layers, whose shape is the generator's. Raises
    BaseModelError where transformers cannot read them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if folder is None:
            return NLayersCompressor(
                config.compressor, generator.model.config, generator.tokenizer, generator.hidden_size
            ).float()
        encoder_config, tokenizer = read_config(folder), load_tokenizer(folder)
        return EncoderCompressor(config.compressor, encoder_config, tokenizer, generator.hidden_size).float()
