"""Whole tiny models for the tests, built once each, and a request for them."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.config import CompressorConfig, Config, GeneratorConfig, PromptConfig
from core.model import Model, build_model
from core.passages import Passage
from core.readouts import PointerReadout

QUERY = "Where does the river Rhine rise?"
PASSAGES = (
    Passage("The river Rhine rises in the Swiss Alps and flows north to the Netherlands, where it reaches the sea."),
    Passage(
        "Marie Curie was born in Warsaw in 1867. She won the Nobel Prize twice: in 1903 and in 1911.", title="Curie"
    ),
    Passage("Bread."),
    Passage("莱茵河发源于瑞士阿尔卑斯山。 ينبع نهر الراين من جبال الألب 👩‍👩‍👧 e\u0301 \u200b naïve"),
)


@cache
def tiny_model(
    generator: Path, encoder: Path | None = None, prompt: PromptConfig | None = None, **settings: Any
) -> Model:
    """A model of tiny bases; `settings` are fields of CompressorConfig.

    Shared by all tests that ask for the same: never change one. Zero-initialised weights are made random, so that
    nothing agrees only because it is zero.
    """
    defaults: dict[str, Any] = {"chunk_tokens": 32, "query_tokens": 64, "rates": (4, 8), "pointer_window": 4}
    if encoder is None:
        defaults |= {"n_layers": 2}
    else:
        defaults |= {"kind": "encoder", "base_model": str(encoder), "projection_dim": 40}
    config = Config(
        compressor=CompressorConfig(**(defaults | settings)),
        generator=GeneratorConfig(base_model=str(generator)),
        prompt=prompt or PromptConfig(),
    )
    model = build_model(config, seed=7)
    if isinstance(model.compressor.readout, PointerReadout):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(8)
            nn.init.normal_(model.compressor.readout.residual.weight, std=0.1)
    return model


def embedding_table(backbone: Any) -> Tensor:
    """The input embeddings `(vocabulary, d)` of a model of transformers, which does not type them."""
    table: Tensor = backbone.get_input_embeddings().weight
    return table
