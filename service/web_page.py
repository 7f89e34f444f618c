"""The web page at `/`: its files, sent as they are, and what its form has to know. Nothing here runs a model."""

from functools import partial
from pathlib import Path

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from service.demo_question import PASSAGES, QUERY
from service.engine import Engine

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# The page loads nothing from elsewhere, runs no inline script, and may not turn text into markup (Trusted Types).
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
router = APIRouter(include_in_schema=False)


class PageState(BaseModel):
    """The checkpoint that serves now and what may be asked of it; null and empty until one does."""

    checkpoint: str | None
    trained: bool
    readout: str | None
    rates: list[int]
    max_new_tokens: int
    key_needed: bool
    example: dict[str, object]


@router.get("/page/state")
async def state(request: Request) -> PageState:
    """What the page shows before anything is asked. No secret: it needs no key, so that a key can be asked for."""
    engine: Engine = request.app.state.engine
    config = engine.active.model.config if engine.active is not None else None
    return PageState(
        checkpoint=engine.active.model.name if engine.active is not None else None,
        trained=config is not None and config.trained,
        readout=config.compressor.readout if config else None,
        rates=list(config.compressor.rates) if config else [],
        max_new_tokens=engine.settings.max_new_tokens,
        key_needed=bool(engine.settings.api_keys),
        example={"query": QUERY, "passages": PASSAGES},
    )


async def _send(path: Path) -> Response:
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    return Response(CONTENT[path], media_type=MEDIA_TYPES[path.suffix], headers=headers)


# Read once: a few small files, and no name from a request ever reaches the file system.
CONTENT = {path: path.read_bytes() for path in sorted(FOLDER.iterdir()) if path.suffix in MEDIA_TYPES}
for _path in CONTENT:
    _url = "/" if _path.name == "index.html" else f"/page/{_path.name}"
    router.add_api_route(_url, partial(_send, _path), methods=["GET"], response_class=Response)
