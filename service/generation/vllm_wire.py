"""What travels to a vLLM server and back: bodies of `/v1/completions` and its answers. Knows no sockets.

Written against vLLM 0.32 (`--enable-prompt-embeds`). Embeddings go out as vLLM reads them, a tensor file of torch in
base64; nothing of the kind is ever read here.
"""

import base64
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from core.errors import EngineError
from core.generator import Generator
from core.prompts import Prompt
from core.sampling import GenerationOptions

TOP_LOGPROBS = 5
TOKEN_PREFIX = "token_id:"


@dataclass(frozen=True, slots=True)
class Written:
    """A whole answer: its tokens, and of each position the log-probabilities of the likeliest tokens by id."""

    token_ids: list[int]
    top_logprobs: list[dict[int, float]]


@torch.inference_mode()
def prompt_fields(generator: Generator, prompt: Prompt) -> dict[str, Any]:
    """A prompt as `generator` reads it: token ids where all of it is text, else the embeddings of every position."""
    if not len(prompt.memory):
        return {"prompt": prompt.ids.tolist()}
    ids, mask = prompt.ids[None].to(generator.device), prompt.memory_mask[None].to(generator.device)  # (1, T)
    embeddings = generator.splice(ids, mask, prompt.memory.to(generator.device))[0]  # (T, d)
    file = io.BytesIO()
    torch.save(embeddings.cpu().clone(), file)  # a view would be written with all that it is a view of
    return {"prompt_embeds": base64.b64encode(file.getbuffer()).decode("ascii")}


def completion_fields(options: GenerationOptions, end_ids: Iterable[int]) -> dict[str, Any]:
    """How the answer is written. Every option is sent: what is left out, vLLM takes from the model's own defaults.

    Stop strings are not sent: text is made here, from the tokens, by the same rules as for every other engine.
    """
    return {
        "max_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "seed": options.seed,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(end_ids),
        "return_token_ids": True,
    }


def with_logprobs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same request, in one piece and with log-probabilities."""
    return {**fields, "stream": False, "logprobs": TOP_LOGPROBS, "return_tokens_as_token_ids": True}


def parse_event(line: bytes) -> list[int] | None:
    """The new tokens in a line of the event stream; None for a line that holds none of the answer.

    Raises EngineError for an error in the stream, or what is no completion.
    """
    if not line.startswith(b"data:"):
        return None
    data = line.removeprefix(b"data:").strip()
    if data == b"[DONE]":
        return None
    body = _parse(data)
    if "error" in body:
        raise EngineError(f"the generator failed: {error_message(body)}")
    choices = body.get("choices")
    return _token_ids(choices[0]) if choices else None  # usage comes without choices


def parse_completion(text: str) -> Written:
    """A completion in one piece, with log-probabilities. Raises EngineError for what is none."""
    try:
        choice = _parse(text)["choices"][0]
        tops = [
            {int(token.removeprefix(TOKEN_PREFIX)): float(value) for token, value in top.items()}
            for top in choice["logprobs"]["top_logprobs"]
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise EngineError("the generator's answer has no log-probabilities by token id") from None
    return Written(_token_ids(choice), tops)


def parse_models(text: str, wanted: str) -> tuple[str, int | None]:
    """Of the list of models, the name of `wanted`, or of the only one, and its longest sequence in tokens.

    Raises EngineError where it is not there, or not the only one.
    """
    listed = _parse(text).get("data")
    entries = listed if isinstance(listed, list) else []
    served = {str(entry["id"]): entry for entry in entries if isinstance(entry, dict) and "id" in entry}
    name = wanted or next(iter(served), "")
    if name not in served or (not wanted and len(served) > 1):
        names = ", ".join(served) or "none"
        raise EngineError(f"generator_model: must be one of the models the generator serves: {names}")
    length = served[name].get("max_model_len")
    return name, length if isinstance(length, int) else None


def error_message(body: Mapping[str, Any]) -> str:
    """What an error in vLLM's shape says, for the log and the operator."""
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:500]


def _parse(data: str | bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise EngineError("the generator sent what is no JSON object")
    return body


def _token_ids(choice: Any) -> list[int]:
    ids = choice.get("token_ids") if isinstance(choice, dict) else None
    if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
        raise EngineError("the generator's answer has no token_ids: it must be vLLM 0.10.2 or newer")
    return ids
