"""The application: an ingress, and one deployment each of compressors and generators, which scale apart."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from fastapi import FastAPI
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.app import create_app
from service.logs import configure_logging
from service.ray_app.fleet import Fleet
from service.ray_app.remote import RemoteEngine
from service.ray_app.replicas import CompressorReplica, GeneratorReplica, ModelReplica
from service.ray_app.settings import RaySettings, read_settings

# Ray holds back what is over this, and the application should answer 429 itself: far above `max_requests`.
HELD_BACK = 100_000


class OneRequestId:
    """Leaves `X-Request-Id` out of responses: Ray's proxy, which has handed the id on, puts it there itself."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self.app(scope, receive, send_without)


class Ingress:
    """The FastAPI application; Ray serves what `__serve_build_asgi_app__` returns."""

    def __init__(self, settings: RaySettings, compressors: Any, generators: Any | None = None) -> None:
        configure_logging(settings.log_level)
        self._settings = settings
        self._fleet = Fleet(compressors, generators)

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self._settings, engine_class=partial(RemoteEngine, self._fleet))
        app.add_middleware(OneRequestId)
        return app


def build_app(values: Mapping[str, str]) -> Any:
    """The application for `serve run`, of settings as `name=value` and `SCALEDOWN_*`. Raises ConfigError."""
    settings = read_settings(values)
    compressors = _deployment(settings, "compressor", CompressorReplica).bind(settings.of_compressor())
    generators = None
    if not settings.generator_url:
        generators = _deployment(settings, "generator", GeneratorReplica).bind(settings.of_generator())
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        num_replicas=1,  # it decides which version serves, and counts whom it lets in
        max_ongoing_requests=HELD_BACK,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_timeout_s=settings.stall_seconds,
        ray_actor_options={"num_cpus": settings.replica_cpus},
    )
    return ingress.bind(settings.of_ingress(), compressors, generators)


def _deployment(settings: RaySettings, kind: str, replica: type[ModelReplica]) -> Any:
    """A deployment that Ray gives as many replicas as its requests need, within its bounds."""
    return serve.deployment(
        replica,
        name=kind.capitalize(),
        autoscaling_config={
            "min_replicas": getattr(settings, f"{kind}_min_replicas"),
            "max_replicas": getattr(settings, f"{kind}_max_replicas"),
            "target_ongoing_requests": getattr(settings, f"{kind}_target_requests"),
            "upscale_delay_s": settings.upscale_seconds,
            "downscale_delay_s": settings.downscale_seconds,
        },
        max_ongoing_requests=HELD_BACK,  # the ingress has let them in
        graceful_shutdown_timeout_s=settings.drain_seconds,
        health_check_timeout_s=settings.stall_seconds,
        ray_actor_options={
            "num_cpus": settings.replica_cpus,
            "num_gpus": getattr(settings, f"{kind}_gpus"),
        },
    )
