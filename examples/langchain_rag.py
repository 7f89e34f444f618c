"""Retrieve, keep what is relevant, answer: a chain of LangChain's over a running service.

    pip install '.[langchain]'
    scaledown serve &
    python examples/langchain_rag.py

The service's address and key are read from SCALEDOWN_URL and SCALEDOWN_API_KEY.
"""

from typing import Any

from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda, RunnablePassthrough

from service.adapters.langchain import ChatScaleDown, ScaleDownRerank, ask

DOCUMENTS = [
    Document("Bread is made of flour, water, salt and yeast, and is baked until its crust is brown."),
    Document("The stone bridge over the Aare was opened to traffic in 1883, after three years.", id="aare"),
    Document("The moon moves around the earth in about 27 days."),
]

reranker = ScaleDownRerank(top_n=2)


def retrieve(question: str) -> list[Document]:
    """Your retriever's place; this one finds everything."""
    return DOCUMENTS


def keep_relevant(inputs: dict[str, Any]) -> dict[str, Any]:
    """Replace the retrieved documents by the best of them."""
    return {**inputs, "documents": reranker.compress_documents(inputs["documents"], inputs["question"])}


chain = (
    {"question": RunnablePassthrough(), "documents": RunnableLambda(retrieve)}
    | RunnableLambda(keep_relevant)
    | RunnableLambda(ask)
    | ChatScaleDown(options={"max_new_tokens": 32})
)


def main() -> None:
    """Ask, and print the answer as it comes."""
    for chunk in chain.stream("When was the bridge over the Aare opened?"):
        print(chunk.text, end="", flush=True)
    cost = chunk.response_metadata  # of the last one
    print(f"\n{cost['tokens_saved']} tokens saved")
    for passage in cost["passages"]:
        print(f"{passage['relevance']:.3f} {passage['mode']} {passage['id'] or ''}")


if __name__ == "__main__":
    main()
