"""Retrieve, keep what is relevant, answer: a pipeline of Haystack's over a running service.

    pip install '.[haystack]'
    scaledown serve &
    python examples/haystack_rag.py

The service's address and key are read from SCALEDOWN_URL and SCALEDOWN_API_KEY.
"""

from haystack import Document, Pipeline
from haystack.components.builders import AnswerBuilder
from haystack.components.retrievers import InMemoryBM25Retriever
from haystack.dataclasses import StreamingChunk
from haystack.document_stores.in_memory import InMemoryDocumentStore

from service.adapters.haystack import ScaleDownGenerator, ScaleDownRanker

DOCUMENTS = [
    Document(content="Bread is made of flour, water, salt and yeast, and is baked until its crust is brown."),
    Document(content="The stone bridge over the Aare was opened to traffic in 1883, after three years.", id="aare"),
    Document(content="The moon moves around the earth in about 27 days."),
]


def build() -> Pipeline:
    """From a query to an answer."""
    store = InMemoryDocumentStore()
    store.write_documents(DOCUMENTS)
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store))
    pipeline.add_component("ranker", ScaleDownRanker(top_k=2))
    pipeline.add_component("generator", ScaleDownGenerator(options={"max_new_tokens": 32}))
    pipeline.add_component("answers", AnswerBuilder())
    pipeline.connect("retriever.documents", "ranker.documents")
    pipeline.connect("ranker.documents", "generator.documents")
    pipeline.connect("ranker.documents", "answers.documents")
    pipeline.connect("generator.replies", "answers.replies")
    return pipeline


def show(chunk: StreamingChunk) -> None:
    """Print a piece of the answer as it comes."""
    print(chunk.content, end="", flush=True)


def main() -> None:
    """Ask, and print the answer as it comes."""
    question = {"query": "When was the bridge over the Aare opened?"}
    inputs = {name: dict(question) for name in ("retriever", "ranker", "answers")}
    result = build().run({**inputs, "generator": {**question, "streaming_callback": show}})
    answer = result["answers"]["answers"][0]
    print(f"\n{answer.meta['usage']['tokens_saved']} tokens saved")
    for document in answer.documents:
        print(f"{document.score:.3f} {document.id}")


if __name__ == "__main__":
    main()
