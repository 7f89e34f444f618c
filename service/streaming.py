"""An answer as server-sent events: `passages`, any number of `token`, then `done` or `error`. Knows no models.

Comments keep the connection alive while nothing is said; a client that leaves frees its slot at the next token.
"""

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.engine import Session
from service.errors import error_content
from service.jobs import Compressed, Delta, Finished
from service.responses import answer_response, answered_passages, record_response
from service.schemas import Evidence

log = logging.getLogger(__name__)


class AnswerStream(Response):
    """Owns the session and closes it when the stream ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(
        self, session: Session, compressed: Compressed, evidence: Mapping[int, Evidence], keepalive_s: float
    ) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._session = session
        self._compressed = compressed
        self._evidence = evidence
        self._keepalive_s = keepalive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the answer is complete or the client leaves."""
        sender = asyncio.create_task(self._send_all(send))
        leaving = asyncio.create_task(until_disconnect(receive))
        try:
            await asyncio.wait((sender, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._session.close()
            for task in (sender, leaving):
                task.cancel()
            outcomes = await asyncio.gather(sender, leaving, return_exceptions=True)
        if isinstance(outcomes[0], Exception) and not isinstance(outcomes[0], OSError):
            raise outcomes[0]

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            passages = answered_passages(self._session, self._compressed, self._evidence)
            checkpoint = self._session.version.model.name
            await self._event(send, "passages", {"passages": _plain(passages), "checkpoint": checkpoint})
            await self._tokens(send)
        except OSError:
            raise
        except Exception as error:
            content = error_content(error)
            if content["error"]["code"] == "internal":
                log.exception("a stream failed")
            self._session.engine.metrics.errors.labels(content["error"]["code"]).inc()
            await self._event(send, "error", content)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tokens(self, send: Send) -> None:
        waiting = asyncio.ensure_future(self._session.next_event())
        try:
            while True:
                # asyncio.wait leaves the pending read alone where wait_for would cancel it and could lose its event.
                done, _ = await asyncio.wait((waiting,), timeout=self._keepalive_s)
                if not done:
                    await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
                    continue
                event = waiting.result()
                if isinstance(event, Finished):
                    response = answer_response(self._session, self._compressed, event, self._evidence)
                    record_response(self._session, self._compressed, response)
                    await self._event(send, "done", response.model_dump())
                    return
                waiting = asyncio.ensure_future(self._session.next_event())
                if isinstance(event, Delta):
                    await self._event(send, "token", {"text": event.text})
        finally:
            waiting.cancel()

    async def _event(self, send: Send, name: str, content: dict[str, Any]) -> None:
        text = f"event: {name}\ndata: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has left. Only for use once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _plain(models: "list[Any]") -> list[dict[str, Any]]:
    return [model.model_dump() for model in models]
