"""Prometheus metrics, each in the unit its name ends with. Knows no requests; one registry for each application.

Several workers write theirs to files of one folder (`service.shared_metrics`), and any of them shows those of all.
"""

import contextlib
import importlib.metadata
from collections.abc import Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from service.shared_metrics import FORGOTTEN, SharedCollector, shared_folder

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOKENS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 65536)
SHARE = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COUNT = (1, 2, 4, 8, 16, 32, 64, 128)
STAGES = ("tokenize", "queue", "compress", "first_token", "decode")
GaugeMode = Literal["livesum", "livemax", "livemin"]  # how the values of several workers become one
RATE = (1, 2, 4, 8, 12, 16, 24, 32, 64, 128)


class Metrics:
    """Everything `/metrics` shows. `checkpoint` labels come from loaded versions only, never from callers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.shared = shared_folder() is not None
        if not self.shared:
            ProcessCollector(registry=registry)  # process_resident_memory_bytes and its like

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"scaledown_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str, mode: GaugeMode = "livesum") -> Gauge:
            return Gauge(f"scaledown_{name}", text, labels, registry=registry, multiprocess_mode=mode)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(f"scaledown_{name}", text, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests_total", "Responses by route and status", "route", "status")
        self.errors = counter("errors_total", "Errors by code, those inside a stream included", "code")
        self.request_seconds = histogram("request_seconds", "Time to the last byte", SECONDS, "route")
        self.stage_seconds = histogram("stage_seconds", "Time in each stage of a request", SECONDS, "stage")
        self.first_token_seconds = histogram("time_to_first_token_seconds", "From arrival to first token", SECONDS)
        self.in_flight = gauge("requests_in_flight", "Requests that hold a place")
        self.in_stage = gauge("requests_in_stage", "Requests by the stage they are in or wait for", "stage")
        self.reserved_tokens = gauge("reserved_tokens", "Tokens of the requests that hold a place")
        self.requests_limit = gauge("requests_limit", "Requests that may hold a place at one time")
        self.reserved_tokens_limit = gauge("reserved_tokens_limit", "Tokens that may be reserved at one time")
        self.batch_rows = histogram("compress_batch_rows", "Chunks in a compression batch", COUNT)
        self.batch_tokens = histogram("compress_batch_tokens", "Tokens in a compression batch, padded", TOKENS)
        self.padding_share = histogram("compress_padding_share", "Padding in a compression batch, 0 to 1", SHARE)
        self.split_batches = counter("split_batches_total", "Batches that failed and were halved")
        self.decode_sequences = histogram("decode_sequences", "Answers that got a token in one step", COUNT)
        self.generator_up = gauge(
            "generator_up", "1 while every worker has a generator for the version that serves", mode="livemin"
        )
        self.generator_up.set(1)  # a worker that still loads misses nothing yet
        self.generator_retries = counter("generator_retries_total", "Prompts sent again to the generator's server")
        self.text_tokens = counter("text_tokens_total", "Prompt tokens had all passages been text", "checkpoint")
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens as they were", "checkpoint")
        self.saved_tokens = counter("tokens_saved_total", "Prompt tokens that were not read, at least 0", "checkpoint")
        self.completion_tokens = counter("completion_tokens_total", "Tokens generated", "checkpoint")
        self.compression_rate = histogram("compression_rate", "Passage tokens by memory embeddings", RATE)
        self.relevance = histogram("relevance", "Relevance of passages, 0 to 1", SHARE, "checkpoint")
        self.store_lookups = counter("embedding_lookups_total", "Lookups by embedding_id", "result")
        self.cache_lookups = counter("cache_lookups_total", "Lookups in each cache", "cache", "result")
        self.cache_evictions = counter("cache_evictions_total", "Entries that made room for others", "cache")
        self.cache_bytes = gauge("cache_bytes", "Memory of each cache", "cache")
        self.model_bytes = gauge("model_bytes", "Memory of the weights of all loaded checkpoints")
        self.store_bytes = gauge("embedding_store_bytes", "Memory of kept embeddings")
        self.swaps = counter("checkpoint_swaps_total", "Attempts to change the checkpoint", "result")
        self.checkpoint = gauge(
            "checkpoint_info", "1 for the version that serves, 0 for those kept", "checkpoint", mode="livemax"
        )
        self.worker_exits = counter("worker_exits_total", "Worker processes that ended and were started again")
        self.build = gauge("build_info", "Always 1; `version` is the program's", "version", mode="livemax")
        self.build.labels(importlib.metadata.version("scaledown")).set(1)
        # Shown as 0 from the start: a series that begins at 1 hides its first event from Prometheus' increase().
        for metric, values in ((self.swaps, ("ok", "refused")), (self.store_lookups, ("hit", "miss"))):
            for value in values:
                metric.labels(value)
        for stage in STAGES:
            self.in_stage.labels(stage)

    def forget(self, checkpoint: str) -> None:
        """Drop what is labelled with a version that was unloaded, so that swaps do not pile up labels."""
        if self.shared:
            self.checkpoint.labels(checkpoint).set(FORGOTTEN)  # files keep every label: it is left out when shown
            return
        for metric in (
            self.text_tokens,
            self.prompt_tokens,
            self.saved_tokens,
            self.completion_tokens,
            self.relevance,
            self.checkpoint,
        ):
            with contextlib.suppress(KeyError):
                metric.remove(checkpoint)

    def observe_batch(self, lengths: Sequence[int]) -> None:
        """Note the lengths of one compression batch."""
        padded = max(lengths) * len(lengths)
        self.batch_rows.observe(len(lengths))
        self.batch_tokens.observe(padded)
        self.padding_share.observe(1 - sum(lengths) / padded)

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        if not self.shared:
            return generate_latest(self.registry)
        registry = CollectorRegistry()
        SharedCollector(registry)
        return generate_latest(registry)
