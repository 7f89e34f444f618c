"""Retrieve, keep what is relevant, answer: a query engine of LlamaIndex's over a running service.

    pip install '.[llamaindex]'
    scaledown serve &
    python examples/llamaindex_rag.py

The service's address and key are read from SCALEDOWN_URL and SCALEDOWN_API_KEY.
"""

from llama_index.core import SummaryIndex
from llama_index.core.base.response.schema import StreamingResponse
from llama_index.core.schema import TextNode

from service.adapters.llamaindex import ScaleDownQueryEngine, ScaleDownRerank

NODES = [
    TextNode(text="Bread is made of flour, water, salt and yeast, and is baked until its crust is brown."),
    TextNode(text="The stone bridge over the Aare was opened to traffic in 1883, after three years.", id_="aare"),
    TextNode(text="The moon moves around the earth in about 27 days."),
]


def main() -> None:
    """Ask, and print the answer as it comes."""
    engine = ScaleDownQueryEngine(
        retriever=SummaryIndex(nodes=NODES).as_retriever(),  # yours: any retriever; this one finds everything
        node_postprocessors=[ScaleDownRerank(top_n=2)],
        options={"max_new_tokens": 32},
        streaming=True,
    )
    response = engine.query("When was the bridge over the Aare opened?")
    assert isinstance(response, StreamingResponse)
    for piece in response.response_gen:
        print(piece, end="", flush=True)
    print(f"\n{(response.metadata or {})['tokens_saved']} tokens saved")
    for source in response.source_nodes:
        print(f"{source.score:.3f} {source.node.node_id}")


if __name__ == "__main__":
    main()
