"""Retrieve, keep what is relevant, answer: a chain of LangChain's over a running service.

    pip install 'scaledown[langchain]'
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

retriever = RunnableLambda(lambda question: DOCUMENTS)  # yours: any retriever is a runnable
reranker = ScaleDownRerank(top_n=2)


def keep_relevant(inputs: dict[str, Any]) -> dict[str, Any]:
    """Replace the retrieved documents by the best of them."""
    return {**inputs, "documents": reranker.compress_documents(inputs["documents"], inputs["question"])}


chain = (
    {"question": RunnablePassthrough(), "documents": retriever}
    | RunnableLambda(keep_relevant)
    | RunnableLambda(ask)
    | ChatScaleDown(options={"max_new_tokens": 32})
)


def main() -> None:
    """Ask, and print the answer as it comes."""
    whole = None
    for chunk in chain.stream("When was the bridge opened?"):
        print(chunk.text, end="", flush=True)
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    print(f"\n{whole.response_metadata['tokens_saved']} tokens saved")
    for passage in whole.response_metadata["passages"]:
        print(f"{passage['relevance']:.3f} {passage['mode']} {passage['id'] or ''}")


if __name__ == "__main__":
    main()
