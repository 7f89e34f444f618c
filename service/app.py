"""The application: settings in, an ASGI app out. The lifespan loads and warms the model, and drains at the end."""

import asyncio
import contextlib
import difflib
import logging
import os
from collections.abc import AsyncIterator, Callable

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette._utils import get_route_path  # the path as routes see it
from starlette.exceptions import HTTPException
from starlette.responses import Response

from core.errors import ScaledownError
from core.model import Model
from service import admin, health, routes, web_page
from service.auth import KeyRing
from service.checkpoints import CheckpointControl, Checkpoints
from service.dialects import openai, rerank
from service.dialects.errors import DialectErrors
from service.engine import Engine
from service.errors import NOTHING_HERE, JSONError, error_body, error_response, plain_response, validation_error
from service.file_thread import FileThread
from service.metrics import Metrics
from service.middleware import Authentication, BodyLimit, HeadAsGet, RequestContext
from service.settings import Settings
from service.tracing import Tracing, open_tracing
from service.versions import Versions

log = logging.getLogger(__name__)
MAX_PATH_CHARS = 100  # that are compared: no path of ours is as long
ROUTERS = (health.router, routes.router, rerank.router, openai.router, admin.router, web_page.router)
PATHS = frozenset(route.path for router in ROUTERS for route in router.routes if isinstance(route, APIRoute))
# Those that everybody may know of; /admin is absent without its key.
PUBLIC_PATHS = sorted(path for path in PATHS if "{" not in path and not path.startswith("/admin"))


def create_app(
    settings: Settings | None = None,
    model: Model | None = None,
    on_fatal: Callable[[], None] | None = None,
    checkpoints: CheckpointControl | None = None,
    engine_class: Callable[[Settings, Metrics], Engine] = Engine,
) -> FastAPI:
    """Build the application.

    `model` replaces the checkpoint that `settings` names. `on_fatal` is called when the worker is lost; by default
    the process exits with status 70, so that whatever started it can start it again. `checkpoints` decides which
    version serves, here and in other processes; by default this process decides for itself. `engine_class` makes the
    engine; by default its models are in this process.
    """
    settings = settings or Settings()
    metrics = Metrics()
    tracing = open_tracing(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = app.state.engine = engine_class(settings, metrics)
        own = Checkpoints(settings, lambda result: metrics.swaps.labels(result).inc())
        app.state.checkpoints = checkpoints or own
        app.state.files = FileThread()
        tasks = [asyncio.create_task(health.watch_worker(engine, on_fatal or _exit))]
        tasks.append(asyncio.create_task(engine.watch_generator()))
        if metrics.shared:
            tasks.append(asyncio.create_task(health.publish_gauges(engine)))
        try:
            versions = Versions(engine, settings)
            first = await versions.start(model, await app.state.checkpoints.first_folder())
            await app.state.checkpoints.join(versions, first)
            if settings.watch_seconds and checkpoints is None:
                tasks.append(asyncio.create_task(own.watch()))
            yield
        finally:
            await engine.drain(0)
            for task in tasks:
                task.cancel()
            await engine.stop()
            if tracing is not None:
                await tracing.close()

    app = FastAPI(
        title="ScaleDown",
        summary="Answers from compressed passages",
        version="0.1.0",
        lifespan=lifespan,
        redoc_url=None,
        docs_url=None,  # it would run scripts from elsewhere
        generate_unique_id_function=lambda route: route.name,  # what generated clients call their methods
        redirect_slashes=False,  # to the host and scheme that the request claims, without a body
    )
    for router in ROUTERS:
        app.include_router(router)
    _handle_errors(app, settings)
    _add_middleware(app, settings, metrics, tracing)
    return app


def _add_middleware(app: FastAPI, settings: Settings, metrics: Metrics, tracing: Tracing | None) -> None:
    """The last one added is the outermost."""
    app.add_middleware(BodyLimit, settings=settings)
    app.add_middleware(Authentication, keys=KeyRing(settings.api_keys, settings.admin_key))
    app.add_middleware(DialectErrors)
    app.add_middleware(HeadAsGet)
    app.add_middleware(RequestContext, metrics=metrics, paths=PATHS, tracing=tracing)


def _exit() -> None:
    # Not sys.exit: a worker that is stuck would keep the process from ending.
    os._exit(os.EX_SOFTWARE)


def _handle_errors(app: FastAPI, settings: Settings) -> None:
    """Every error leaves in the one shape."""

    @app.exception_handler(ScaledownError)
    async def ours(_: Request, error: ScaledownError) -> Response:
        response = error_response(error, settings.overload_status)
        if response.status_code == 500:
            log.error("a request failed", exc_info=error)
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return JSONError(validation_error(error.errors(), error.body), 422)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if error.status_code == 400:  # FastAPI's word for what its parser could not read
            return JSONError(error_body("invalid_json", "the body cannot be read as JSON in UTF-8", "body"), 422)
        message = str(error.detail)
        if error.status_code == 404:
            message = _nothing_at(get_route_path(request.scope))
        elif error.status_code == 405:
            message = "this path does not take this method"
        return plain_response(error.status_code, message, error.headers)


def _nothing_at(path: str) -> str:
    """What to say of a path that is not there: where all are, and the one that was meant if that is plain."""
    near = difflib.get_close_matches(path[:MAX_PATH_CHARS], PUBLIC_PATHS, n=1, cutoff=0.75)
    return NOTHING_HERE + (f" (did you mean {near[0]}?)" if near else "")
