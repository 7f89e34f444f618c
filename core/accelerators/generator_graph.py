"""The generator as two graphs of fixed shapes: one reads a prompt, one writes a token a slot. Keys and values are
tensors that go in and come out. Knows no accelerator, no prompts and no sampling; the rules are those of `graph.py`.

Input embeddings are looked up on the host: the graphs hold the layers and the head, and no table of embeddings.
"""

import copy
import hashlib
import json
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from core.accelerators.buckets import Bucket
from core.accelerators.graph import MASKED, NOT_COMPUTED
from core.errors import ConfigError
from core.generator import Generator
from core.kv_slots import AttentionMasks, PassCache, kv_shape

VARYING_ROPE = {"dynamic", "longrope"}  # kinds of rotary embeddings whose frequencies depend on the positions there are


class GeneratorGraph(nn.Module):
    """Layers and head of `generator`, sharing its weights; both graphs have the same state.

    Raises ConfigError for a model whose graph would depend on values.
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        _check_rope(generator.model.config)
        decoder, head = generator.model.get_decoder(), generator.model.get_output_embeddings()
        shared: dict[int, Any] = {id(each): each for each in chain(decoder.parameters(), head.parameters())}
        self.decoder = copy.deepcopy(decoder, shared)
        self.decoder.set_input_embeddings(nn.Identity())
        self.decoder.set_attn_implementation("eager")
        self.head = copy.deepcopy(head, shared)
        self.eval()

    def hidden(self, embeddings: Tensor, positions: Tensor, keys: Tensor, cache: "ExplicitCache") -> Tensor:
        """Final hidden states `(B, T, d)` of `embeddings` `(B, T, d)` at `positions` `(B, T)`; keys stand at `keys`
        `(1, K)`."""
        masks = AttentionMasks(self.decoder.config, embeddings.dtype, MASKED).between(positions, keys)
        output = self.decoder(
            inputs_embeds=embeddings, attention_mask=masks, position_ids=positions, cache=cache, use_cache=True
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


class PrefillGraph(GeneratorGraph):
    """One prompt, padded on the right."""

    def forward(self, embeddings: Tensor, last: Tensor) -> tuple[Tensor, ...]:
        """Next logits `(1, V)`, then keys and values `(1, kv_heads, T, head_dim)` of each layer in turn.

        embeddings  (1, T, d)
        last        (1,) int64, where the prompt's last token stands; nothing behind it is seen by what is before
        """
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)[None]  # (1, T)
        cache = ExplicitCache()
        hidden = self.hidden(embeddings, positions, positions, cache)
        return (self.head(hidden.index_select(1, last)[:, 0]), *cache.tensors)


class DecodeGraph(GeneratorGraph):
    """One token in every slot."""

    def forward(self, embeddings: Tensor, positions: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Next logits `(S, V)`, then `tensors` with the new tokens' keys and values written into them.

        embeddings  (S, 1, d)
        positions   (S,) int64, where each token stands in its slot; nothing behind it is seen
        tensors     keys and values `(S, kv_heads, C, head_dim)` of each layer in turn
        """
        places = torch.arange(tensors[0].shape[2], device=embeddings.device)[None]  # (1, C)
        written = (places == positions[:, None])[:, None, :, None]  # (S, 1, C, 1)
        cache = ExplicitCache(tensors, written)
        hidden = self.hidden(embeddings, positions[:, None], places, cache)  # (S, 1, d)
        return (self.head(hidden[:, 0]), *cache.tensors)


class ExplicitCache(PassCache):
    """Keys and values of one pass, in the shape of transformers' `Cache`; nothing is written in place.

    given    of a decode step: what the slots hold; empty for a prefill
    written  (S, 1, C, 1) bool of a decode step: where the new token goes
    tensors  what the pass leaves: keys and values of each layer in turn
    """

    def __init__(self, given: tuple[Tensor, ...] = (), written: Tensor | None = None) -> None:
        self._given = given
        self._written = written
        self.tensors: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take one layer's new keys and values `(B, kv_heads, T, head_dim)`; returns what to attend to."""
        if self._written is not None:
            # (S, kv_heads, 1, head_dim) is broadcast over the capacity.
            keys = torch.where(self._written, keys, self._given[2 * layer_idx])
            values = torch.where(self._written, values, self._given[2 * layer_idx + 1])
        self.tensors += [keys, values]
        return keys, values


def empty_cache(generator: Generator, bucket: Bucket) -> list[Tensor]:
    """Zeros `(slots, kv_heads, capacity, head_dim)`, keys and values of each layer in turn.

    Zeros, not empty: a masked position still enters the sum with weight 0, and 0 * NaN is NaN.
    """
    config = generator.model.config
    kv_heads, head_dim = kv_shape(config)
    shape = (bucket.rows, kv_heads, bucket.length, head_dim)
    return [torch.zeros(shape, dtype=generator.dtype) for _ in range(2 * config.num_hidden_layers)]


def prefill_example(generator: Generator, bucket: Bucket) -> tuple[Tensor, ...]:
    """Inputs of `PrefillGraph` for `bucket`: half a prompt, half padding."""
    embeddings = torch.zeros(1, bucket.length, generator.hidden_size, dtype=generator.dtype)
    return embeddings, torch.tensor([bucket.length // 2])


def decode_example(generator: Generator, bucket: Bucket) -> tuple[Tensor, ...]:
    """Inputs of `DecodeGraph` for `bucket`: every slot at another position."""
    embeddings = torch.zeros(bucket.rows, 1, generator.hidden_size, dtype=generator.dtype)
    return embeddings, torch.arange(bucket.rows) % bucket.length, *empty_cache(generator, bucket)


def generator_architecture(generator: Generator) -> str:
    """sha256 of everything that the graphs depend on but their weights' values."""
    settings = generator.model.config.to_dict()
    facts = {
        "config": {key: value for key, value in settings.items() if key not in NOT_COMPUTED},
        "weights": {name: list(value.shape) for name, value in GeneratorGraph(generator).state_dict().items()},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _check_rope(config: PretrainedConfig) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(each for each in rope.values() if isinstance(each, dict))]  # models that mix kinds of layers
    for kind in kinds:
        if kind.get("rope_type") in VARYING_ROPE:
            raise ConfigError(f"generator: rotary embeddings of type {kind['rope_type']} cannot be in a fixed graph")
