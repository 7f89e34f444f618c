"""What is kept between requests: memory embeddings of equal rows, and what the compressor made of chunks."""
