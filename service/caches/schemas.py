"""What responses say of the caches."""

from pydantic import BaseModel, Field


class CacheUsage(BaseModel):
    """How many of a request's chunks were not computed, or not wholly."""

    cached_chunks: int = Field(default=0, description="chunks whose memory embeddings were known from an equal row")
    cached_documents: int = Field(default=0, description="other chunks that were known, and read for this query only")
