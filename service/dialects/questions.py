"""From a conversation to the one question and the passages that the service takes. Knows no HTTP.

The last user message is the question. Documents come in `documents`, in `context` messages, and in the `tool` messages
that follow the question: what an agent retrieved for it. A checkpoint is trained on single questions under a system
prompt of its own, so everything before the question is refused, unless the caller or the operator says what to do
with it.
"""

from collections.abc import Iterator, Sequence

from core.errors import InvalidInputError
from service.dialects.openai_schemas import ChatMessage, ChatRequest, Document
from service.schemas import PassageIn
from service.settings import EarlierMessages

RETRIEVED = ("tool", "function")
SPEAKERS = ("user", "assistant")


def chat_question(body: ChatRequest, default: EarlierMessages) -> tuple[str, list[PassageIn]]:
    """The question and the passages; `default` holds where no `earlier_messages` is given. Raises InvalidInputError."""
    asked = max((i for i, message in enumerate(body.messages) if message.role == "user"), default=None)
    if asked is None:
        raise InvalidInputError("messages", "hold no message of the user")
    _check_after(body.messages, asked)
    query = "\n".join(body.messages[asked].texts)
    if not query:
        raise InvalidInputError(f"messages.{asked}.content", "is empty")
    earlier = [(i, m) for i, m in enumerate(body.messages[:asked]) if m.role != "context" and m.texts]
    treatment = body.earlier_messages or default
    if earlier and treatment == "refuse":
        raise InvalidInputError(
            f"messages.{earlier[0][0]}",
            "only the last user message is read, as the question: leave out what comes before it, or set "
            "earlier_messages to ignore or prepend, in the request or for the service",
        )
    if treatment == "prepend":
        query = "\n".join([*(_quoted(m) for _, m in earlier if m.role not in RETRIEVED), query])
    passages = [*passages_of(body.documents or ()), *_retrieved(body.messages, asked)]
    if not passages:
        raise InvalidInputError("documents", "are required: here, or as tool or context messages")
    return query, passages


def passages_of(documents: Sequence[str | Document]) -> list[PassageIn]:
    """Documents as the service's passages."""
    return [
        PassageIn(text=each)
        if isinstance(each, str)
        else PassageIn(text=each.text, title=each.title, id=None if each.id is None else str(each.id))
        for each in documents
    ]


def _check_after(messages: Sequence[ChatMessage], asked: int) -> None:
    for index, message in enumerate(messages[asked + 1 :], asked + 1):
        if message.role not in (*RETRIEVED, "context") and message.texts and not message.tool_calls:
            raise InvalidInputError(
                f"messages.{index}", "comes after the last user message: only tool and context messages may"
            )


def _retrieved(messages: Sequence[ChatMessage], asked: int) -> Iterator[PassageIn]:
    """Each text of a message that carries documents is a passage."""
    for index, message in enumerate(messages):
        if message.role == "context" or (message.role in RETRIEVED and index > asked):
            yield from (PassageIn(text=text) for text in message.texts)


def _quoted(message: ChatMessage) -> str:
    text = "\n".join(message.texts)
    return f"{message.role}: {text}" if message.role in SPEAKERS else text
