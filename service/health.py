"""Whether the service is alive and ready, and what happens when its worker is not. Knows no models."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from core.errors import EngineError
from service.engine import Engine
from service.errors import NotReadyError
from service.metrics import STAGES

log = logging.getLogger(__name__)
router = APIRouter()
NOT_NOW: dict[int | str, dict[str, Any]] = {503: {"description": "no, and `status` says why"}}
CHECK_SECONDS = 0.5
# Between failing the requests and leaving: time for their responses to reach the clients.
GOODBYE_SECONDS = 1.0


@router.get("/livez", responses=NOT_NOW)
async def livez(request: Request) -> Response:
    """200 while the process can do work; 503 when its worker is dead or stuck, and a restart is due."""
    engine: Engine = request.app.state.engine
    trouble = worker_trouble(engine)
    return JSONResponse({"status": trouble or "alive"}, 503 if trouble else 200)


@router.get("/readyz", responses=NOT_NOW)
@router.get("/health", responses=NOT_NOW, name="health")
async def readyz(request: Request) -> Response:
    """200 once the model is loaded and warm, and as long as requests are taken; else 503 and the reason.

    `/health` is `/readyz` by the name that vLLM, SGLang and TEI have for it.
    """
    engine: Engine = request.app.state.engine
    trouble = worker_trouble(engine)
    if trouble or not engine.ready or engine.active is None:
        reason = trouble or (engine.refusal.message if engine.refusal else "the model is being loaded")
        return JSONResponse({"status": reason}, 503, {"Retry-After": "5"})
    if unwritten := engine.active.lane.generator.trouble:
        return JSONResponse({"status": unwritten}, 503, {"Retry-After": "5"})
    model = engine.active.model
    state = {"status": "ready", "checkpoint": model.name, "trained": model.config.trained}
    return JSONResponse(state | {"document_cache": engine.caches.no_documents(model) or "on"})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format."""
    engine: Engine = request.app.state.engine
    set_gauges(engine)
    return Response(engine.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def set_gauges(engine: Engine) -> None:
    """Bring the gauges up to date."""
    shown, stages = engine.metrics, Counter(session.stage for session in engine.sessions)
    shown.in_flight.set(engine.gate.requests)
    shown.reserved_tokens.set(engine.gate.tokens)
    shown.requests_limit.set(engine.gate.max_requests)
    shown.reserved_tokens_limit.set(engine.gate.max_tokens)
    shown.store_bytes.set(engine.store.size)
    engine.caches.publish()
    if engine.active is not None:
        shown.generator_up.set(engine.active.lane.generator.trouble is None)
    for stage in STAGES:
        shown.in_stage.labels(stage).set(stages[stage])


async def publish_gauges(engine: Engine) -> None:
    """Keep this process's gauges true for whichever worker is asked for the metrics of all."""
    while True:
        set_gauges(engine)
        await asyncio.sleep(CHECK_SECONDS)


def worker_trouble(engine: Engine) -> str | None:
    """What is wrong with the worker's thread, or None."""
    if not engine.worker.alive:
        return "the worker thread has died"
    if engine.worker.stalled_for() > engine.settings.stall_seconds:
        return "the worker thread makes no progress"
    return None


async def watch_worker(engine: Engine, on_fatal: Callable[[], None]) -> None:
    """Fail every request and call `on_fatal` once the worker cannot be relied on any more.

    A process that cannot work must not look alive: clients would hang, and nothing would restart it.
    """
    while (trouble := worker_trouble(engine)) is None:
        await asyncio.sleep(CHECK_SECONDS)
    log.critical("the service cannot go on", extra={"reason": trouble})
    engine.refuse(NotReadyError(trouble))
    engine.fail_all(EngineError(trouble))
    await asyncio.sleep(GOODBYE_SECONDS)
    on_fatal()
