"""The operator's limits on a request that is well formed. Raises TooLargeError (413) and names field and limit."""

from collections.abc import Sequence

from core.errors import InvalidInputError, TooLargeError
from core.model import Model
from core.policy import RequestMode
from service.admission import CHARS_PER_TOKEN
from service.schemas import AnswerPassage, AnswerRequest, CompressRequest, PassageIn, RerankRequest
from service.settings import Settings

MAX_JSON_NUMBERS = 250_000  # in one body, either way: reading or writing them holds up every other request
AnyRequest = AnswerRequest | CompressRequest | RerankRequest
AnyPassage = str | PassageIn | AnswerPassage


def check_limits(request: AnyRequest, settings: Settings) -> None:
    """Refuse what is over a limit before anything is tokenised."""
    _at_most("query", len(request.query), settings.max_query_chars, "characters")
    _at_most("passages", len(request.passages), settings.max_passages, "passages")
    for index, passage in enumerate(request.passages):
        _at_most(f"passages.{index}.text", passage_chars(passage), settings.max_passage_chars, "characters")
    if request.timeout is not None and request.timeout > settings.max_timeout_seconds:
        limit = int(settings.max_timeout_seconds)
        raise TooLargeError("timeout", f"is over {limit} seconds", limit)
    if isinstance(request, AnswerRequest):
        _at_most("max_new_tokens", request.max_new_tokens, settings.max_new_tokens, "tokens")
        _at_most("stop", len(request.stop), settings.max_stop, "strings")


def check_tokens(tokens: int, settings: Settings) -> None:
    """Refuse passages that are too long together, once their tokens are known."""
    _at_most("passages", tokens, settings.max_request_tokens, "tokens in all")


def check_encoding(request: CompressRequest, numbers: int) -> None:
    """Refuse to write so many numbers of embeddings as nested lists."""
    if request.encoding == "json" and numbers > MAX_JSON_NUMBERS:
        message = f"{numbers} numbers are over the limit of {MAX_JSON_NUMBERS} as json: ask for base64"
        raise TooLargeError("encoding", message, MAX_JSON_NUMBERS)


def check_rate(rate: int | None, model: Model) -> None:
    """Refuse a rate that the checkpoint was not trained for, before any work on the passages."""
    rates = model.config.compressor.rates
    if rate is not None and rate not in rates:
        raise InvalidInputError("rate", f"must be one of {', '.join(map(str, rates))}")


def check_prompt(prompt_tokens: int, max_new_tokens: int, model: Model, query: str, mode: RequestMode) -> None:
    """Refuse a prompt that leaves no room for its answer; it is the answer that is too long if no passage has room.

    `mode` is the one that made the prompt so long; the message names those that may make a shorter one.
    """
    limit = model.generator.max_tokens
    if prompt_tokens + max_new_tokens <= limit:
        return
    over = f"the prompt of {prompt_tokens} tokens and max_new_tokens {max_new_tokens} are over the generator's {limit}"
    if model.template.frame(query, 0)[0] + max_new_tokens > limit:
        raise TooLargeError("max_new_tokens", f"{over} positions: ask for fewer new tokens", limit)
    shorter = "auto" if mode == "compressed" else "compressed or auto"
    raise TooLargeError("passages", f"{over} positions: send less, use mode {shorter}, or set max_prompt_tokens", limit)


def passage_chars(passage: AnyPassage) -> int:
    """Characters of a passage with its title."""
    if isinstance(passage, str):
        return len(passage)
    return len(passage.text or "") + len(passage.title)


def estimated_tokens(query: str, passages: Sequence[AnyPassage]) -> int:
    """A first guess at the tokens of a request, for admission before tokenising."""
    return (len(query) + sum(passage_chars(passage) for passage in passages)) // CHARS_PER_TOKEN + len(passages)


def _at_most(field: str, count: int, limit: int, unit: str) -> None:
    if count > limit:
        raise TooLargeError(field, f"{count} is over the limit of {limit} {unit}", limit)
