"""Compressors, generator, checkpoint format and the pipeline from passages to an answer. Knows no HTTP."""
