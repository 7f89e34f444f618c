"""An answer as server-sent events, in a format of the endpoint's choice. Knows no models.

Comments keep the connection alive while nothing is said; a client that leaves frees its slot at the next token.
"""

import asyncio
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import ClientLeftError, DeadlineError, code_of, error_content, note_error
from service.jobs import Compressed, Delta, Finished
from service.response_schemas import AnsweredPassage, AnswerResponse, Evidence
from service.responses import answer_response, answered_passages
from service.session import Session

log = logging.getLogger(__name__)
# For a stream's client, beyond the deadline, to take in what was sent before; for others, to take nothing meanwhile.
SLOW_READER_SECONDS = 10.0


class AnswerFormat(Protocol):
    """How an answer is written: in one piece, or from `opening` to `ending` or `failure`."""

    def whole(self, response: AnswerResponse) -> bytes:
        """The body of a response in one piece."""

    def opening(self, passages: Sequence[AnsweredPassage], checkpoint: str) -> bytes:
        """What a stream begins with."""

    def piece(self, text: str) -> bytes:
        """A piece of the answer's text."""

    def ending(self, response: AnswerResponse) -> bytes:
        """What a complete answer ends with."""

    def failure(self, content: Mapping[str, Any]) -> bytes:
        """What an answer ends with that cannot be completed; `content` as from `error_content`."""


class Events:
    """The service's own format: events `passages`, any number of `token`, then `done` or `error`."""

    def whole(self, response: AnswerResponse) -> bytes:
        """The body of a response in one piece."""
        return response.model_dump_json().encode()

    def opening(self, passages: Sequence[AnsweredPassage], checkpoint: str) -> bytes:
        """The `passages` event."""
        return _event("passages", {"passages": [each.model_dump() for each in passages], "checkpoint": checkpoint})

    def piece(self, text: str) -> bytes:
        """A `token` event."""
        return _event("token", {"text": text})

    def ending(self, response: AnswerResponse) -> bytes:
        """The `done` event: what would have been the response in one piece."""
        return _event("done", response.model_dump())

    def failure(self, content: Mapping[str, Any]) -> bytes:
        """The `error` event."""
        return _event("error", content)


class AnswerStream(Response):
    """Owns the session and closes it when the stream ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(
        self, session: Session, compressed: Compressed, evidence: Mapping[int, Evidence], form: AnswerFormat
    ) -> None:
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._session = session
        self._compressed = compressed
        self._evidence = evidence
        self._form = form
        self._keepalive_s = session.engine.settings.keepalive_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send events until the answer is complete, the client leaves, or it has stopped reading past the deadline."""
        sender = asyncio.create_task(self._send_all(scope, send))
        leaving = asyncio.create_task(until_disconnect(receive))
        try:
            patience = self._session.seconds_left + SLOW_READER_SECONDS
            await asyncio.wait((sender, leaving), return_when=asyncio.FIRST_COMPLETED, timeout=patience)
            if not sender.done():
                note_error(scope, ClientLeftError.code if leaving.done() else DeadlineError.code)
        finally:
            self._session.close()
            for task in (sender, leaving):
                task.cancel()
            outcomes = await asyncio.gather(sender, leaving, return_exceptions=True)
        if isinstance(outcomes[0], Exception) and not isinstance(outcomes[0], OSError):
            raise outcomes[0]

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            passages = answered_passages(self._session, self._compressed, self._evidence)
            await _send_part(send, self._form.opening(passages, self._session.version.model.name))
            await self._tokens(send)
        except OSError:
            note_error(scope, ClientLeftError.code)
            raise
        except Exception as error:
            content = error_content(error)
            if content["error"]["code"] == "internal":
                log.exception("a request failed")
            note_error(scope, code_of(error))
            self._session.record()
            await _send_part(send, self._form.failure(content))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tokens(self, send: Send) -> None:
        waiting = asyncio.ensure_future(self._session.next_event())
        try:
            while True:
                # asyncio.wait leaves the pending read alone where wait_for would cancel it and could lose its event.
                done, _ = await asyncio.wait((waiting,), timeout=self._keepalive_s)
                if not done:
                    await _send_part(send, b": keep-alive\n\n")
                    continue
                event = waiting.result()
                if isinstance(event, Finished):
                    response = answer_response(self._session, self._compressed, event, self._evidence)
                    self._session.record()
                    await _send_part(send, self._form.ending(response))
                    return
                waiting = asyncio.ensure_future(self._session.next_event())
                if isinstance(event, Delta):
                    await _send_part(send, self._form.piece(event.text))
        finally:
            waiting.cancel()


async def until_disconnect(receive: Receive) -> None:
    """Return when the client has left. Only for use once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_part(send: Send, part: bytes) -> None:
    await send({"type": "http.response.body", "body": part, "more_body": True})


def _event(name: str, content: Mapping[str, Any]) -> bytes:
    # ASCII only: some clients take U+2028 and its like for the end of a line.
    return f"event: {name}\ndata: {json.dumps(content, allow_nan=False)}\n\n".encode()
