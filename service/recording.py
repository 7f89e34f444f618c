"""What the metrics hold of the work on a request, whether or not its answer was finished. Knows no HTTP."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.compressed import CompressedPassage
from service.metrics import Metrics

if TYPE_CHECKING:
    from service.session import Session


def record_passages(metrics: Metrics, checkpoint: str, passages: Sequence[CompressedPassage]) -> None:
    """Count how relevant passages are, and at which rate they were compressed."""
    for passage in passages:
        if passage.relevance is not None:
            metrics.relevance.labels(checkpoint).observe(passage.relevance)
    if read := [passage for passage in passages if passage.chunks]:
        tokens = sum(passage.tokens for passage in read)
        metrics.compression_rate.observe(tokens / sum(passage.memory_tokens for passage in read))


def record_work(session: "Session") -> None:
    """Count the stages a request was in, the one it was given up in included, and the tokens read and written."""
    metrics, checkpoint = session.engine.metrics, session.version.model.name
    for stage, milliseconds in session.timings_ms().items():
        metrics.stage_seconds.labels(stage).observe(milliseconds / 1000)
    if session.seconds_to_first_token() is not None:  # until then its prompt was not read
        metrics.text_tokens.labels(checkpoint).inc(session.text_tokens)
        metrics.prompt_tokens.labels(checkpoint).inc(session.prompt_tokens)
        metrics.saved_tokens.labels(checkpoint).inc(max(0, session.text_tokens - session.prompt_tokens))
        metrics.completion_tokens.labels(checkpoint).inc(session.completion_tokens)
