"""The OpenAI dialect, as the real `openai` client sees it over a socket."""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from tests.service.calls import PASSAGES, QUERY, answer
from tests.service.conftest import Serve

KEY = "alpha-0123456789abcdef"
ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": QUERY}]


def sdk(client: httpx.Client, key: str = KEY, max_retries: int = 0) -> openai.OpenAI:
    """The real client, pointed at the test's server."""
    http = openai.DefaultHttpxClient(trust_env=False)
    return openai.OpenAI(base_url=address(client), api_key=key, max_retries=max_retries, http_client=http)


def address(client: httpx.Client) -> str:
    return str(client.base_url.join("/v1"))


@pytest.fixture(scope="module")
def ai(client: httpx.Client) -> Iterator[openai.OpenAI]:
    with sdk(client) as found:
        yield found


def chat(ai: openai.OpenAI, messages: list[ChatCompletionMessageParam] = ASK, **extra: Any) -> ChatCompletion:
    return ai.chat.completions.create(
        model="scaledown", messages=messages, max_completion_tokens=8, extra_body={"documents": PASSAGES, **extra}
    )


@pytest.mark.parametrize("mode", ["compressed", "hybrid", "text"])
def test_chat_answers_as_the_native_endpoint_does(client: httpx.Client, ai: openai.OpenAI, mode: str) -> None:
    native = answer(client, mode=mode, rate=8)
    got = chat(ai, mode=mode, rate=8)
    assert got.object == "chat.completion"
    assert got.model == native["checkpoint"]
    assert [choice.message.role for choice in got.choices] == ["assistant"]
    assert got.choices[0].message.content == native["answer"]
    assert got.choices[0].finish_reason == native["finish_reason"]
    assert got.usage is not None
    assert got.usage.prompt_tokens == native["usage"]["prompt_tokens"]
    assert got.usage.completion_tokens == native["usage"]["completion_tokens"]
    assert got.usage.total_tokens == got.usage.prompt_tokens + got.usage.completion_tokens
    assert got.usage.model_extra == {name: native["usage"][name] for name in ("text_tokens", "tokens_saved")}


@pytest.mark.parametrize("explain", [True, False])
def test_what_became_of_the_documents_is_what_the_native_endpoint_says(
    client: httpx.Client, ai: openai.OpenAI, explain: bool
) -> None:
    native = answer(client, explain=explain)
    body: dict[str, Any] = {"documents": PASSAGES, "explain": explain}
    chunks = ai.chat.completions.create(model="scaledown", messages=ASK, max_tokens=8, stream=True, extra_body=body)
    *_, last = chunks
    completion = ai.completions.create(model="scaledown", prompt=QUERY, max_tokens=8, extra_body=body)
    for own in (chat(ai, explain=explain).model_extra, last.model_extra, completion.model_extra):
        assert own is not None
        said = own["scaledown"]
        assert said == {name: native[name] for name in ("passages", "answerable", "plan")}
        assert (said["plan"]["estimates_ms"] is not None) == explain


def test_options_reach_the_generator(client: httpx.Client, ai: openai.OpenAI) -> None:
    sampled: dict[str, Any] = {"temperature": 2.0, "top_p": 0.9, "seed": 3}
    native = answer(client, **sampled, top_k=50)
    got = ai.chat.completions.create(
        model="scaledown", messages=ASK, max_tokens=8, extra_body={"documents": PASSAGES, "top_k": 50}, **sampled
    )
    assert got.choices[0].message.content == native["answer"] != answer(client)["answer"]
    first = native["answer"].strip().split()[0]
    stopped = ai.chat.completions.create(
        model="scaledown", messages=ASK, stop=first, extra_body={"documents": PASSAGES, "top_k": 50}, **sampled
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert first not in (stopped.choices[0].message.content or "")


@pytest.mark.parametrize("usage", [True, False])
def test_streamed_chunks_are_openais(client: httpx.Client, ai: openai.OpenAI, usage: bool) -> None:
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(
        ai.chat.completions.create(
            model="scaledown", messages=ASK, max_tokens=8, stream=True, extra_body={"documents": PASSAGES}, **options
        )
    )
    native = answer(client)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert {chunk.model for chunk in chunks} == {native["checkpoint"]}
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    if usage:
        last = chunks.pop()
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == native["usage"]["completion_tokens"]
        assert (last.usage.model_extra or {})["tokens_saved"] == native["usage"]["tokens_saved"]
        assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks)
    first, *middle, end = [chunk.choices[0] for chunk in chunks]
    assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
    assert all(choice.delta.role is None and choice.finish_reason is None for choice in middle)
    assert "".join(choice.delta.content or "" for choice in middle) == native["answer"]
    assert end.delta.model_dump(exclude_none=True) == {}
    assert end.finish_reason == native["finish_reason"]


def test_the_stream_ends_with_done(client: httpx.Client) -> None:
    body = {"model": "scaledown", "messages": ASK, "max_tokens": 4, "stream": True, "documents": PASSAGES}
    response = client.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(chunk.startswith("data: {") for chunk in chunks)


def test_async_and_async_streaming(client: httpx.Client) -> None:
    async def ask() -> tuple[str | None, str]:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with openai.AsyncOpenAI(base_url=address(client), api_key=KEY, http_client=http) as ai:
            extra = {"documents": PASSAGES}
            whole = ai.chat.completions.create(model="scaledown", messages=ASK, max_tokens=8, extra_body=extra)
            stream = await ai.chat.completions.create(
                model="scaledown", messages=ASK, max_tokens=8, stream=True, extra_body=extra
            )
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return (await whole).choices[0].message.content, "".join(pieces)

    expected = answer(client)["answer"]
    assert asyncio.run(ask()) == (expected, expected)


DOCUMENT_SHAPES = {
    "vllm": [{"title": "Bread", "text": "Made of flour."}, {"text": "The moon."}],
    "cohere": [{"id": "a", "data": {"title": "Bread", "snippet": "Made of flour."}}, {"data": "The moon."}],
    "own keys": [{"id": 7, "title": "Bread", "text": "Made of flour.", "url": "https://x.example"}, "The moon."],
}


@pytest.mark.parametrize("shape", DOCUMENT_SHAPES)
def test_documents_in_every_shape(client: httpx.Client, ai: openai.OpenAI, shape: str) -> None:
    native = answer(client, passages=[{"title": "Bread", "text": "Made of flour."}, "The moon."], mode="text")
    got = chat(ai, documents=DOCUMENT_SHAPES[shape], mode="text")
    assert got.choices[0].message.content == native["answer"]
    assert got.usage is not None
    assert got.usage.prompt_tokens == native["usage"]["prompt_tokens"]


def test_what_an_agent_retrieved_are_the_documents(client: httpx.Client, ai: openai.OpenAI) -> None:
    native = answer(client, passages=["Radium.", "Polonium.", "The moon."], mode="text")
    call: Any = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": "{}"}}
    messages: list[Any] = [
        {"role": "context", "content": "Radium."},
        {"role": "user", "content": [{"type": "text", "text": QUERY}]},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "Polonium."}]},
        {"role": "tool", "tool_call_id": "c2", "content": "The moon."},
    ]
    got = chat(ai, messages, documents=None, mode="text", tools=[{"type": "function", "function": {"name": "search"}}])
    assert got.usage is not None
    assert got.usage.prompt_tokens == native["usage"]["prompt_tokens"]
    assert got.choices[0].message.content == native["answer"]


def test_earlier_messages_are_refused_unless_told_otherwise(client: httpx.Client, ai: openai.OpenAI) -> None:
    system, said, last = "Be brief.", "What is bread?", "And the moon?"
    messages: list[ChatCompletionMessageParam] = [
        {"role": "system", "content": system},
        {"role": "user", "content": said},
        {"role": "assistant", "content": "Flour."},
        {"role": "user", "content": last},
    ]
    with pytest.raises(openai.BadRequestError, match="earlier_messages") as caught:
        chat(ai, messages)
    assert caught.value.param == "messages.0"
    prompts = {
        "ignore": last,
        "prepend": f"{system}\nuser: {said}\nassistant: Flour.\n{last}",
    }
    for choice, query in prompts.items():
        got = chat(ai, messages, earlier_messages=choice)
        native = answer(client, query=query)
        assert got.choices[0].message.content == native["answer"]
        assert got.usage is not None
        assert got.usage.prompt_tokens == native["usage"]["prompt_tokens"]


def test_completions(client: httpx.Client, ai: openai.OpenAI) -> None:
    native = answer(client)
    options: Any = {"model": "scaledown", "prompt": QUERY, "max_tokens": 8, "extra_body": {"documents": PASSAGES}}
    got = ai.completions.create(**options)
    assert (got.object, got.choices[0].text) == ("text_completion", native["answer"])
    assert got.choices[0].finish_reason == native["finish_reason"]
    assert got.usage is not None
    assert got.usage.prompt_tokens == native["usage"]["prompt_tokens"]
    chunks = list(ai.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == got.usage
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == native["answer"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == native["finish_reason"]


def test_models(ai: openai.OpenAI, client: httpx.Client) -> None:
    names = [model.id for model in ai.models.list()]
    assert names == ["untrained", "scaledown"]
    for name in names:
        assert ai.models.retrieve(name).id == name
        body = {"model": name, "messages": ASK, "documents": PASSAGES, "max_tokens": 1}
        assert client.post("/v1/chat/completions", json=body).json()["model"] == "untrained"
    with pytest.raises(openai.NotFoundError) as caught:
        ai.models.retrieve("gpt-5")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_an_existing_chain_is_served_once_the_service_is_set_for_it(serve: Serve) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "system", "content": "Be brief."}, *ASK]
    names = "gpt-4o-mini, meta-llama/Llama-3.1-8B"
    with serve(served_model_names=names, earlier_messages="ignore") as client, sdk(client) as ai:
        listed = [model.id for model in ai.models.list()]
        assert listed == ["untrained", "scaledown", "gpt-4o-mini", "meta-llama/Llama-3.1-8B"]
        assert [ai.models.retrieve(name).id for name in listed] == listed
        for name in listed[2:]:
            got = ai.chat.completions.create(
                model=name, messages=messages, max_tokens=8, extra_body={"documents": PASSAGES}
            )
            assert got.model == "untrained"
            assert got.choices[0].message.content == answer(client)["answer"]
        with pytest.raises(openai.NotFoundError, match="use one of untrained, scaledown, gpt-4o-mini"):
            ai.chat.completions.create(model="gpt-5", messages=ASK, extra_body={"documents": PASSAGES})
        with pytest.raises(openai.BadRequestError, match="earlier_messages"):
            chat(ai, messages, earlier_messages="refuse")  # a request that says what it wants gets that


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"n": 2}, "n", "must be 1"),
        ({"stop": 5}, "stop", "must be a text or a list"),
        ({"stop": ["a", 5]}, "stop.1", "must be a valid string"),
        ({"documents": [{"id": [], "text": "a"}]}, "documents.0.id", "must be a valid"),
        ({"logprobs": True}, "logprobs", "False"),
        ({"presence_penalty": 0.5}, "presence_penalty", "0"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "text"),
        ({"tool_choice": "required"}, "tool_choice", "auto"),
        ({"tool_choice": {"type": "function", "function": {"name": "search"}}}, "tool_choice", "auto"),
        ({"tools": [], "function_call": {"name": "search"}}, "function_call", "auto"),
        ({"temprature": 0.5}, "temprature", "unknown field"),
        ({"max_tokens": 100_000}, "max_tokens", "max_tokens: 100000 is over the limit"),
        ({"rate": 3}, "rate", "must be one of 16, 8"),
        ({"mode": "gist"}, "mode", "compressed"),
        ({"documents": []}, "documents", "required"),
        ({"documents": ["a", " "]}, "documents.1", "is empty"),
        ({"documents": [{"title": "a"}]}, "documents.0.text", "is required"),
        ({"documents": ["x" * 500_000]}, "documents.0.text", "documents.0.text: 500000 is over the limit"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "system", "content": "Hi."}]}, "messages", "no message of the user"),
        ({"messages": [*ASK, {"role": "assistant", "content": "It was"}]}, "messages.1", "after the last user"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages.0.content", "is empty"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "messages", "messages: 9000 is over the limit"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
            "text",
        ),
    ],
)
def test_what_is_refused_names_its_parameter(
    ai: openai.OpenAI, change: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ai.chat.completions.create(model="scaledown", messages=ASK, extra_body={"documents": PASSAGES, **change})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "change",
    [
        {"reasoning_effort": "low"},
        {"verbosity": "high"},
        {"prompt_cache_retention": "24h"},
        {"prediction": {"type": "content", "content": "Marie"}},
        {"functions": [], "function_call": "auto"},
        {"tools": [{"type": "function", "function": {"name": "search"}}], "tool_choice": "auto"},
        {"seed": -1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_has_no_effect_is_accepted(client: httpx.Client, ai: openai.OpenAI, change: dict[str, Any]) -> None:
    assert chat(ai, **change).choices[0].message.content == answer(client)["answer"]


def test_a_negative_seed_is_one_of_its_own(ai: openai.OpenAI) -> None:
    said = [chat(ai, seed=seed, temperature=3.0).choices[0].message.content for seed in (-1, -1, -2, 1)]
    assert said[0] == said[1]
    assert len(set(said)) == 3


@pytest.mark.parametrize("prompt", [5, [], ["a", "b"], [""], {}])
def test_a_prompt_that_is_no_question_is_refused_by_its_name(client: httpx.Client, prompt: object) -> None:
    body = {"model": "scaledown", "prompt": prompt, "documents": ["a"]}
    refused = client.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == ("prompt.0" if prompt == [""] else "prompt")


def test_error_classes(serve: Serve) -> None:
    with serve(api_keys=KEY) as client:
        with sdk(client, "wrong-0123456789abcdef") as ai, pytest.raises(openai.AuthenticationError) as refused:
            ai.models.list()
        assert refused.value.type == "authentication_error"
        keyless = client.get("/v1/models")
        assert (keyless.status_code, keyless.headers["www-authenticate"]) == (401, "Bearer")
        assert keyless.json()["error"]["code"] == "unauthorized"
        with sdk(client) as ai:
            assert ai.models.list().data
            with pytest.raises(openai.NotFoundError):
                ai.embeddings.create(model="scaledown", input="x")
            with pytest.raises(openai.InternalServerError) as late:
                chat(ai, timeout=0.000001)
            assert (late.value.status_code, late.value.code) == (504, "deadline")
            assert late.value.request_id


def test_overload_is_retried_by_the_client(serve: Serve) -> None:
    with serve(max_buffered_bytes=10) as client:
        with sdk(client) as ai, pytest.raises(openai.RateLimitError) as caught:
            chat(ai)
        assert caught.value.response.headers["retry-after"] == "1"
        assert (caught.value.code, caught.value.type) == ("overloaded", "rate_limit_error")
        began = time.monotonic()
        with sdk(client, max_retries=1) as ai, pytest.raises(openai.RateLimitError):
            chat(ai)
        assert time.monotonic() - began >= 1  # as long as Retry-After says


def test_an_error_inside_a_stream_is_raised(serve: Serve) -> None:
    with serve() as client, sdk(client) as ai:
        stream = ai.chat.completions.create(
            model="scaledown",
            messages=ASK,
            max_tokens=500,
            stream=True,
            extra_body={"documents": PASSAGES, "timeout": 0.2, "seed": 1, "temperature": 5.0},
        )
        with pytest.raises(openai.APIError, match="deadline"):
            list(stream)
        body = {"model": "scaledown", "messages": ASK, "max_tokens": 500, "stream": True, "documents": PASSAGES}
        text = client.post("/v1/chat/completions", json={**body, "timeout": 0.2}).text
        *_, failure, done, _ = text.split("\n\n")
        assert json.loads(failure.removeprefix("data: "))["error"]["type"] == "server_error"
        assert done == "data: [DONE]"
