"""How an answer is written as OpenAI writes it, in one piece or in chunks. Knows no engine."""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from service.dialects.errors import openai_error
from service.dialects.openai_responses import (
    AnswerMessage,
    ChatChoice,
    ChatResponse,
    CompletionResponse,
    CompletionUsage,
    Passages,
    TextChoice,
)
from service.response_schemas import AnsweredPassage, AnswerResponse

DONE = b"data: [DONE]\n\n"


@dataclass
class ChatFormat:
    """A chat completion. `usage_wanted`: a stream ends with a chunk that holds the usage and no choice."""

    usage_wanted: bool = False
    kind: str = "chat.completion.chunk"
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    checkpoint: str = ""

    def whole(self, response: AnswerResponse) -> bytes:
        """The body of a response in one piece."""
        choice = ChatChoice(message=AnswerMessage(content=response.answer), finish_reason=response.finish_reason)
        return self._written(ChatResponse, response, choice)

    def opening(self, passages: Sequence[AnsweredPassage], checkpoint: str) -> bytes:
        """The chunk that says who speaks."""
        self.checkpoint = checkpoint
        return self._choice({"delta": {"role": "assistant", "content": ""}})

    def piece(self, text: str) -> bytes:
        """A chunk of text."""
        return self._choice({"delta": {"content": text}})

    def ending(self, response: AnswerResponse) -> bytes:
        """Why it ended, the usage if it is wanted, and the end of the stream."""
        return self._last({"delta": {}}, response)

    def failure(self, content: Mapping[str, Any]) -> bytes:
        """The error, which OpenAI's client raises, and the end of the stream."""
        return _data(openai_error(500, content["error"])) + DONE

    def _written(
        self, kind: type[ChatResponse] | type[CompletionResponse], response: AnswerResponse, choice: Any
    ) -> bytes:
        made = kind(
            id=self.id,
            created=self.created,
            model=response.checkpoint,
            choices=[choice],
            usage=usage_of(response),
            system_fingerprint=response.checkpoint,
            scaledown=passages_of(response),
        )
        return made.model_dump_json().encode()

    def _choice(self, said: Mapping[str, Any], finish_reason: str | None = None, **own: Any) -> bytes:
        return self._chunk([{"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}], **own)

    def _last(self, said: Mapping[str, Any], response: AnswerResponse) -> bytes:
        ended = self._choice(said, response.finish_reason, scaledown=passages_of(response).model_dump())
        usage = self._chunk([], usage_of(response).model_dump()) if self.usage_wanted else b""
        return ended + usage + DONE

    def _chunk(self, choices: list[dict[str, Any]], usage: Mapping[str, int] | None = None, **own: Any) -> bytes:
        chunk = {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.checkpoint,
            "system_fingerprint": self.checkpoint,
            "choices": choices,
            **own,
        }
        # With include_usage every chunk has the field, and all but the last have null in it.
        return _data({**chunk, "usage": usage} if self.usage_wanted else chunk)


@dataclass
class TextFormat(ChatFormat):
    """A text completion: the same with `text` in place of messages, and nothing to say first."""

    kind: str = "text_completion"
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")

    def whole(self, response: AnswerResponse) -> bytes:
        """The body of a response in one piece."""
        choice = TextChoice(text=response.answer, finish_reason=response.finish_reason)
        return self._written(CompletionResponse, response, choice)

    def opening(self, passages: Sequence[AnsweredPassage], checkpoint: str) -> bytes:
        """Nothing."""
        self.checkpoint = checkpoint
        return b""

    def piece(self, text: str) -> bytes:
        """A chunk of text."""
        return self._choice({"text": text})

    def ending(self, response: AnswerResponse) -> bytes:
        """Why it ended, the usage if it is wanted, and the end of the stream."""
        return self._last({"text": ""}, response)


def passages_of(response: AnswerResponse) -> Passages:
    """What became of each document, and whether they hold an answer."""
    return Passages(passages=response.passages, answerable=response.answerable, plan=response.plan)


def usage_of(response: AnswerResponse) -> CompletionUsage:
    """Usage by OpenAI's names, and what was saved."""
    usage = response.usage
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        text_tokens=usage.text_tokens,
        tokens_saved=usage.tokens_saved,
    )


def _data(content: Mapping[str, Any]) -> bytes:
    # ASCII only: some clients take U+2028 and its like for the end of a line.
    return f"data: {json.dumps(content, allow_nan=False)}\n\n".encode()
