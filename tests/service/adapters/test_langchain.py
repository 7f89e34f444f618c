"""LangChain's interfaces over a live service: what its chains would see."""

import asyncio
from typing import Any, Literal

import httpx
import pytest
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnableLambda, RunnablePassthrough
from pydantic import SecretStr

from service.adapters.langchain import ChatScaleDown, ScaleDownRerank, ask, passage_of
from service.client import AuthenticationError, InvalidRequestError
from tests.service.calls import QUERY, answer
from tests.service.conftest import Serve

KEY = "alpha-0123456789abcdef"
DOCUMENTS = [
    Document("Marie Curie was born in Warsaw. She discovered polonium and radium. " * 6, id="curie"),
    Document("It is made of flour, water, salt and yeast.", metadata={"title": "Bread", "page": 3}),
    Document("The moon moves around the earth in about 27 days."),
]
PASSAGES = [
    {"id": "curie", "text": DOCUMENTS[0].page_content},
    {"title": "Bread", "text": DOCUMENTS[1].page_content},
    DOCUMENTS[2].page_content,
]
OPTIONS = {"max_new_tokens": 8}


def chat(client: httpx.Client, **values: Any) -> ChatScaleDown:
    return ChatScaleDown(**{"url": str(client.base_url), "options": OPTIONS, **values})


def ranking(client: httpx.Client, hops: int = 1) -> list[tuple[int, float]]:
    response = client.post("/rerank", json={"query": QUERY, "passages": PASSAGES, "hops": hops})
    return [(each["index"], each["relevance"]) for each in response.json()["results"]]


@pytest.mark.parametrize("hops", [1, 2])
def test_documents_come_back_in_order_of_relevance(client: httpx.Client, hops: Literal[1, 2]) -> None:
    expected = ranking(client, hops)
    rerank = ScaleDownRerank(url=str(client.base_url), hops=hops)
    got = rerank.compress_documents(DOCUMENTS, QUERY)
    assert [document.page_content for document in got] == [DOCUMENTS[index].page_content for index, _ in expected]
    assert [document.metadata["relevance_score"] for document in got] == [relevance for _, relevance in expected]
    assert next(document for document in got if "page" in document.metadata).metadata["page"] == 3
    assert "relevance_score" not in DOCUMENTS[0].metadata, "the caller's own documents stay as they are"
    assert asyncio.run(rerank.acompress_documents(DOCUMENTS, QUERY)) == got
    assert rerank.compress_documents([], QUERY) == []
    assert rerank.compress_documents([Document(""), *DOCUMENTS], QUERY) == got  # such as a picture's
    assert rerank.compress_documents([Document("")], QUERY) == []


def test_what_is_not_relevant_is_left_out(client: httpx.Client) -> None:
    (best, most), (_, second), _ = ranking(client)
    url = str(client.base_url)
    for rerank in (ScaleDownRerank(url=url, top_n=1), ScaleDownRerank(url=url, min_relevance=(most + second) / 2)):
        assert [document.id for document in rerank.compress_documents(DOCUMENTS, QUERY)] == [DOCUMENTS[best].id]
        assert len(asyncio.run(rerank.acompress_documents(DOCUMENTS, QUERY))) == 1


def test_a_message_has_the_answer_and_what_it_cost(client: httpx.Client) -> None:
    expected = answer(client, passages=PASSAGES)
    model = chat(client)
    for message in (
        model.invoke(QUERY, documents=DOCUMENTS),
        model.bind(documents=DOCUMENTS).invoke([HumanMessage(QUERY)]),
        asyncio.run(model.ainvoke(QUERY, documents=PASSAGES)),
    ):
        assert isinstance(message, AIMessage)
        assert message.text == expected["answer"]
        assert message.usage_metadata is not None
        assert message.usage_metadata["input_tokens"] == expected["usage"]["prompt_tokens"]
        assert message.usage_metadata["output_tokens"] == expected["usage"]["completion_tokens"]
        assert message.response_metadata["tokens_saved"] == expected["usage"]["tokens_saved"]
        assert message.response_metadata["answerable"] == expected["answerable"]
        assert message.response_metadata["model_name"] == expected["checkpoint"]
        assert [each["relevance"] for each in message.response_metadata["passages"]] == [
            each["relevance"] for each in expected["passages"]
        ]


def test_a_stream_adds_up_to_the_message(client: httpx.Client) -> None:
    model = chat(client)
    whole = model.invoke(QUERY, documents=DOCUMENTS)

    async def collect() -> list[AIMessageChunk]:
        return [chunk async for chunk in model.astream(QUERY, documents=DOCUMENTS)]

    for chunks in (list(model.stream(QUERY, documents=DOCUMENTS)), asyncio.run(collect())):
        assert len(chunks) > 2
        total = chunks[0]
        for chunk in chunks[1:]:
            total = total + chunk
        assert total.text == whole.text
        assert total.usage_metadata == whole.usage_metadata
        assert total.response_metadata["tokens_saved"] == whole.response_metadata["tokens_saved"]


def test_a_chain_from_question_to_text(client: httpx.Client) -> None:
    def retrieve(question: str) -> list[Document]:
        return DOCUMENTS

    chain = (
        {"question": RunnablePassthrough(), "documents": RunnableLambda(retrieve)} | RunnableLambda(ask) | chat(client)
    )
    text = chain | StrOutputParser()
    expected = answer(client, passages=PASSAGES)["answer"]
    assert text.invoke(QUERY) == expected
    assert "".join(text.stream(QUERY)) == expected
    assert asyncio.run(text.ainvoke(QUERY)) == expected
    assert text.batch([QUERY, QUERY]) == [expected] * 2


def test_options_of_the_call_win(client: httpx.Client) -> None:
    model = chat(client, options={"max_new_tokens": 2, "mode": "text"})
    message = model.invoke(QUERY, documents=DOCUMENTS, max_new_tokens=4, mode="compressed")
    assert message.text == answer(client, passages=PASSAGES, max_new_tokens=4)["answer"]
    stop = answer(client, passages=PASSAGES)["answer"][3]
    assert stop not in chat(client).invoke(QUERY, stop=[stop], documents=DOCUMENTS).text


def test_of_an_object_what_no_passage_has_is_passed_over() -> None:
    passage = passage_of({"text": "a", "title": "b", "source": "x.pdf"})
    assert (passage.text, passage.title) == ("a", "b")


def test_what_cannot_be_asked_is_refused_with_the_way_out(client: httpx.Client) -> None:
    model = chat(client)
    with pytest.raises(ValueError, match="documents: give at least one"):
        model.invoke(QUERY)
    with pytest.raises(ValueError, match="messages: the last one must be the question of a human"):
        model.invoke([AIMessage("Hello")], documents=DOCUMENTS)
    with pytest.raises(InvalidRequestError, match="modus: unknown field"):
        model.invoke(QUERY, documents=DOCUMENTS, modus="text")
    talk = [SystemMessage("Be brief."), HumanMessage(QUERY)]
    with pytest.raises(ValueError, match="earlier_messages='ignore'"):
        model.invoke(talk, documents=DOCUMENTS)
    told = chat(client, earlier_messages="ignore").invoke(talk, documents=DOCUMENTS)
    assert told.text == model.invoke(QUERY, documents=DOCUMENTS).text


def test_the_key_is_sent_and_not_shown(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(api_keys=KEY) as client:
        with pytest.raises(AuthenticationError):
            chat(client).invoke(QUERY, documents=DOCUMENTS)
        model = chat(client, api_key=SecretStr(KEY))
        assert model.invoke(QUERY, documents=DOCUMENTS).text
        assert KEY not in repr(model)
        monkeypatch.setenv("SCALEDOWN_URL", str(client.base_url))
        monkeypatch.setenv("SCALEDOWN_API_KEY", KEY)
        assert ScaleDownRerank().compress_documents(DOCUMENTS, QUERY)
