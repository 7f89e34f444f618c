"""The service in the words of others: rerank as TEI, Jina, vLLM and Cohere speak it, chat as OpenAI does."""
