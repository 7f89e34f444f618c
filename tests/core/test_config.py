"""Configurations are checked whole: every key, every type, every contradiction."""

import dataclasses
import datetime
import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.config import CompressorConfig, Config, dump_config, parse_config
from core.errors import ConfigError


def test_an_empty_config_is_the_papers_defaults() -> None:
    config = parse_config(Config, {}, "config.json")
    assert config == Config()
    assert (config.compressor.chunk_tokens, config.compressor.rates, config.compressor.readout) == (
        128,
        (16,),
        "memory",
    )
    assert config.compressor.max_memory_tokens == 8


def test_a_dumped_config_reads_back_the_same() -> None:
    compressor = CompressorConfig(kind="encoder", base_model="minilm-l6", readout="pointer", rates=(16, 4))
    config = Config(compressor=compressor, trained=True)
    text = dump_config(config)
    assert parse_config(Config, json.loads(text), "config.json") == config
    assert dump_config(parse_config(Config, json.loads(text), "config.json")) == text


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"compresor": {}}, "compresor: unknown key"),
        ({"compressor": {"layers": 3}}, "compressor.layers: unknown key"),
        ({"compressor": {"n_layers": "eight"}}, "compressor.n_layers"),
        ({"compressor": {"n_layers": 0}}, "compressor.n_layers"),
        ({"compressor": {"n_layers": "8"}}, "compressor.n_layers: must be a valid integer"),
        ({"compressor": {"n_layers": 8.0}}, "compressor.n_layers: must be a valid integer"),
        ({"compressor": {"query_tokens": True}}, "compressor.query_tokens: must be a valid integer"),
        ({"compressor": {"rates": ["16"]}}, "compressor.rates.0: must be a valid integer"),
        ({"compressor": {"pointer_window": 4097}}, "compressor.pointer_window"),
        ({"compressor": {"chunk_tokens": 1 << 31}}, "compressor.chunk_tokens"),
        ({"trained": "yes"}, "trained: must be a valid boolean"),
        ({"trained": 1}, "trained: must be a valid boolean"),
        ({"relevance": {"scale": "1.5"}}, "relevance.scale: must be a valid number"),
        ({"relevance": {"scale": False}}, "relevance.scale: must be a valid number"),
        ({datetime.date(2024, 1, 1): 1}, "keys must be str"),
        ({"compressor": {"readout": "mean"}}, "compressor.readout"),
        ({"compressor": {"kind": "encoder"}}, "base_model"),
        ({"compressor": {"base_model": "minilm-l6"}}, "base_model"),
        ({"compressor": {"rates": []}}, "rates"),
        ({"compressor": {"rates": [8, 8]}}, "rates"),
        ({"compressor": {"rates": [256]}}, "rates"),
        ({"relevance": {"scale": math.inf}}, "relevance.scale"),
        ({"relevance": {"threshold": 1.5}}, "relevance.threshold"),
        ({"prompt": {"hybrid_top": 0}}, "prompt.hybrid_top"),
        ({"format_version": 2}, "format_version"),
        ([], "top level"),
    ],
)
def test_what_is_wrong_is_named(values: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(Config, values, "my.json")
    assert caught.value.message.startswith("my.json: ")
    assert said in caught.value.message


def test_an_integer_is_a_number_and_a_list_a_tuple() -> None:
    config = parse_config(Config, {"relevance": {"scale": 2}, "compressor": {"rates": [16, 8]}}, "my.json")
    assert (config.relevance.scale, config.compressor.rates) == (2.0, (16, 8))


def test_every_wrong_key_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"n_layers.*nonsense: unknown key"):
        parse_config(Config, {"compressor": {"n_layers": -1}, "nonsense": 1}, "my.json")


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().trained = True  # type: ignore[misc]  # what is tested


@given(
    chunk_tokens=st.integers(1, 512),
    rates=st.lists(st.integers(1, 64), min_size=1, max_size=4, unique=True),
    tokens=st.integers(1, 512),
    allocation=st.sampled_from(["fixed", "proportional"]),
)
def test_memory_tokens_fit_the_slots_and_the_chunk(
    chunk_tokens: int, rates: list[int], tokens: int, allocation: Any
) -> None:
    rates = [min(rate, chunk_tokens) for rate in rates]
    tokens = min(tokens, chunk_tokens)
    config = CompressorConfig(chunk_tokens=chunk_tokens, rates=tuple(dict.fromkeys(rates)), allocation=allocation)
    for rate in config.rates:
        memory = config.memory_tokens(tokens, rate)
        assert 1 <= memory <= min(tokens, config.max_memory_tokens)
        if allocation == "proportional":
            assert memory == math.ceil(tokens / rate)
        else:
            assert memory == min(tokens, math.ceil(chunk_tokens / rate))
    assert config.memory_tokens(chunk_tokens, min(config.rates)) == config.max_memory_tokens
