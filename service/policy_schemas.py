"""What a request may ask of the policy, and what a response says of it. The rules are in `core/policy.py`."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo

from core.config import Mode
from core.policy import PlanReason


def _only_in_hybrid(value: int, info: ValidationInfo) -> int:
    """Raises ValueError for a `hybrid_top` that the mode beside it, declared before it, passes over.

    `rate` passes in every mode: who compares modes sends it with each. This one asks for texts that would not come.
    """
    if info.data.get("mode", "hybrid") != "hybrid":
        raise ValueError("is only for mode hybrid; set mode to hybrid, or leave this out")
    return value


HybridTop = Annotated[
    int,
    Field(ge=1, description="passages hybrid shows as text too; refused in other modes"),
    AfterValidator(_only_in_hybrid),
]
MaxPromptTokens = Annotated[
    int,
    Field(
        ge=1,
        description="bound on the generator's prompt, template included; the least relevant passages are dropped first",
    ),
]
Hops = Annotated[
    int,
    Field(
        ge=1,
        le=2,
        description="2: for questions that need two passages: all but the most relevant are read again, for the query"
        " and that one. Compressing costs two to three times as much",
    ),
]
MinRelevance = Annotated[float, Field(ge=0, le=1, description="passages less relevant than this are dropped")]


class EstimatesMs(BaseModel):
    """Milliseconds from compression to the first token, by what a token costs here; hybrid: the cheaper for each."""

    text: float
    compressed: float
    hybrid: float


class PlanOut(BaseModel):
    """How the request as a whole was served."""

    mode: Mode | None = Field(description="what the passages' modes amount to; null where all were dropped")
    reason: PlanReason = Field(
        description="asked: by the request's mode; costs: measured costs decide what is compressed; relevance: all are"
        " compressed, since relevance has to be known"
    )
    rate: int | None = Field(
        description="of what the compressor read; auto takes a coarser one where the bound asks for it; null where it"
        " read nothing: all came as embeddings, or auto shows all as text"
    )
    max_prompt_tokens: int | None
    estimates_ms: EstimatesMs | None = Field(default=None, description="with explain, where costs are known")
