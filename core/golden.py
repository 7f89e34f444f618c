"""The golden example: one small question with passages, and what the model made of it when it was saved.

Knows no models, and no folders but the two files' own; `golden_check.py` runs it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pydantic.dataclasses
import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from core.config import STRICT, Positive, dump_config
from core.manifest import parse_json, read_bounded
from core.tensor_files import read_tensors, write_tensors

QUERY = "In which year was the bridge over the Aare opened?"
PASSAGES = (
    "The bridge over the Aare was opened in 1883 after three years of work. It is 229 metres long.",
    "Bread is made of flour, water, salt and yeast, and the dough has to rest before it is baked.",
    "The Aare rises in the glaciers of the Bernese Alps and is 288 kilometres long.",
    "The old wooden bridge was torn down in 1881 because it could no longer carry the new trams.",
    "A tunnel was dug under the river in 1974, and since then few lorries cross the town.",
    "Tickets for the museum are sold at the station from nine in the morning until five.",
    "The engineer Maria Weber drew the plans in 1879 and led the work until her death in 1882.",
    "Steel expands when it is warm, so a bridge of 200 metres is some centimetres longer in summer.",
)
PASSAGES_USED = 3
ANSWER_TOKENS = 16


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)
class GoldenExample:
    """golden.json: the input, what it became (so many memory embeddings of so many chunks), and the greedy answer in
    `compressed` mode."""

    query: str = QUERY
    passages: Annotated[tuple[str, ...], Field(min_length=1)]
    rate: Positive
    memory_tokens: Positive
    chunks: Positive
    answer: str
    answer_ids: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1, max_length=ANSWER_TOKENS)]


@dataclass(frozen=True)
class Golden:
    """The example with its outputs, as float32 on the CPU.

    memory     (M, d) memory embeddings of all passages, joined
    scores     (chunks,) raw relevance scores
    logprobs   (A,) log-probability of each of the answer's tokens
    """

    example: GoldenExample
    memory: Tensor
    scores: Tensor
    logprobs: Tensor

    @property
    def outputs(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {"memory": self.memory, "scores": self.scores, "logprobs": self.logprobs}


def write_golden(folder: Path, golden: Golden) -> None:
    """Write golden.json and golden.safetensors into `folder`."""
    (folder / "golden.json").write_text(dump_config(golden.example), encoding="utf-8")
    write_tensors(folder / "golden.safetensors", golden.outputs, torch.float32)


def read_golden(folder: Path, width: int) -> Golden:
    """Read them back; `width` is the generator's. Raises CheckpointError."""
    example = parse_json(GoldenExample, read_bounded(folder / "golden.json"), "golden.json")
    shapes = {
        "memory": (example.memory_tokens, width),
        "scores": (example.chunks,),
        "logprobs": (len(example.answer_ids),),
    }
    return Golden(example, **dict(read_tensors(folder / "golden.safetensors", shapes, torch.float32)))
