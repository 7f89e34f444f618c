"""What it saves to know chunks: time to compress the same passages unknown, known, and without a cache, side by side.

The three take turns within a repeat, on new passages each time, so that a drift of the machine is in all of them.
Prints nothing and writes nothing.
"""

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from core.byte_lru import ByteLRU
from core.compressors import NLayersCompressor
from core.config import CompressorConfig, Config, GeneratorConfig
from core.costs import clock
from core.document_cache import DocumentCache, caches_documents
from core.errors import ConfigError
from core.model import Model, build_model
from core.packed_linear import pack_model
from core.pipeline import compress, prepare
from service.benchmark.questions import make_questions
from service.benchmark.statistics import paired_ratios, spread
from service.loading import compute_dtype, load_model
from service.settings import Settings

Notify = Callable[[str], None]
LAYERS = 8  # of the untrained compressor, as in the paper's smaller one
CACHE_BYTES = 8 * 2**30  # more than any case needs: nothing is pushed out


def cache_models(settings: Settings) -> tuple[Model, Model]:
    """A model that reads the chunk first, and one of the same shapes that reads the query first.

    Speed does not depend on training: but for a checkpoint's own, weights are as they are initialised. Raises
    ConfigError for a checkpoint that has no documents to cache.
    """
    if settings.checkpoint is None:
        config = CompressorConfig(n_layers=LAYERS, order="document_first")
        return _untrained(config, settings.base_model, settings), _query_first(config, settings.base_model, settings)
    model = load_model(settings)
    if not caches_documents(model.config):
        raise ConfigError("checkpoint: must have an n_layers compressor with order document_first")
    return model, _query_first(model.config.compressor, model.base.name, settings)


def _query_first(config: CompressorConfig, base_model: str, settings: Settings) -> Model:
    return _untrained(replace(config, order="query_first"), base_model, settings)


def _untrained(config: CompressorConfig, base_model: str, settings: Settings) -> Model:
    generator = GeneratorConfig(base_model=base_model)
    model = build_model(
        Config(compressor=config, generator=generator), device=settings.device, dtype=compute_dtype(settings)
    )
    pack_model(model)  # as served
    return model


def run_cache_case(
    models: tuple[Model, Model], passages: int, passage_tokens: int, query_tokens: int, repeats: int, notify: Notify
) -> dict[str, Any]:
    """One number of passages; the entry of the JSON. Ratios over 1 say how many times faster."""
    seconds: dict[str, list[float]] = {}
    held = 0
    for repeat in range(-1, repeats):  # the first warms up
        notify(f"{passages} passages: repeat {repeat + 1} of {repeats}")
        sizes = {"passages": passages, "passage_tokens": passage_tokens, "query_tokens": query_tokens}
        # Two questions; the second is asked of the first one's passages.
        asked, other = make_questions(models[0].generator.tokenizer, 2, **sizes, seed=repeat + 1)
        taken, held = _run_once(models, (asked.query, other.query), asked.passages, last=repeat % 2 == 0)
        if repeat >= 0:
            for name, value in taken.items():
                seconds.setdefault(name, []).append(value)
    return {
        "passages": passages,
        "cache_bytes": held,
        "seconds": {name: asdict(spread(values)) for name, values in seconds.items()},
        "ratios": {
            "warm_over_cold": asdict(paired_ratios(seconds["cold"], seconds["warm"])),
            "warm_over_uncached": asdict(paired_ratios(seconds["uncached"], seconds["warm"])),
            "cold_over_uncached": asdict(paired_ratios(seconds["uncached"], seconds["cold"])),
            "query_once_over_each": asdict(paired_ratios(seconds["query_each"], seconds["query_once"])),
        },
    }


def _reading_each(model: Model) -> Model:
    """`model`, of the same weights, with a compressor that reads a query again for each chunk."""
    compressor = copy.copy(model.compressor)
    assert isinstance(compressor, NLayersCompressor)
    compressor.least_saving = 2.0  # more than all
    return replace(model, compressor=compressor)


def _run_once(
    models: tuple[Model, Model], queries: tuple[str, str], passages: Sequence[Any], last: bool
) -> tuple[dict[str, float], int]:
    """Seconds of every variant, and bytes that the chunks take; `last`: the plain variants come after the others."""
    first, second = models
    assert isinstance(first.compressor, NLayersCompressor)  # what `caches_documents` says
    documents = DocumentCache("benchmark", first.compressor, ByteLRU(CACHE_BYTES))
    cached = replace(first, documents=documents)
    runs = [("cold", cached, queries[1]), ("warm", cached, queries[0]), ("query_once", second, queries[0])]
    plain = [("uncached", first, queries[0]), ("query_each", _reading_each(second), queries[0])]
    now = clock(first.device)
    taken = {}
    for name, model, query in [*runs, *plain] if last else [*plain, *runs]:
        request = prepare(model, query, list(passages))
        gc.collect()
        began = now()
        compress(model, [request])
        taken[name] = now() - began
    return taken, documents.memory.bytes
