"""What a checkpoint is made of, as validated, immutable dataclasses. Knows nothing about tensors or files.

Every key is checked: an unknown key, a wrong type or a contradiction raises `ConfigError` and names the key.
"""

import dataclasses
import json
import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from core.errors import ConfigError

STRICT = ConfigDict(extra="forbid", strict=True)  # no "8", no 8.0 and no true for 8; an integer is a number, too
T = TypeVar("T")

Positive = Annotated[int, Field(ge=1, lt=1 << 31)]
MAX_WINDOW = 4096
Kind = Literal["n_layers", "encoder"]
Readout = Literal["memory", "pooled", "pointer"]
Order = Literal["query_first", "document_first"]
Mode = Literal["compressed", "text", "hybrid"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CompressorConfig:
    """The compressor: which weights it copies, what it reads and what it writes.

    kind            `n_layers`: own copy of the generator's first `n_layers` layers (OSCAR sec. 3.1);
                    `encoder`: a bidirectional encoder and FC-ReLU-FC to the generator's width (OSCAR app. J)
    base_model      the encoder's name; empty for `n_layers`, which copies the generator
    n_layers        layers copied; only for `n_layers`
    projection_dim  hidden width of FC-ReLU-FC; only for `encoder`
    readout         `memory`: hidden state of each memory slot (the paper); `pooled`: mean over equal segments of
                    the chunk; `pointer`: the generator's input embeddings of tokens that a softmax over the chunk picks
    pointer_window  consecutive memory slots that share one softmax: it picks a start, slot j reads j tokens on; where
                    a chunk has no more slots than this, all of them are one window
    pointer_lead    the window begins this many tokens before the token that is pointed at
    order           `query_first` (the paper) or `document_first` (a causal compressor can cache the chunk)
    query_tokens    the query's own budget in compressor tokens: it never eats the chunk's, and a longer one is refused
    chunk_tokens    the chunk's budget in generator tokens
    rates           compression rates this checkpoint is trained for; the first is the default
    allocation      `fixed`: chunk_tokens / rate embeddings for each chunk; `proportional`: tokens of the chunk / rate
    """

    kind: Kind = "n_layers"
    base_model: str = ""
    n_layers: Positive = 8
    projection_dim: Positive = 8096
    readout: Readout = "memory"
    pointer_window: Annotated[int, Field(ge=1, le=MAX_WINDOW)] = 8
    pointer_lead: Annotated[int, Field(ge=0, le=MAX_WINDOW)] = 1
    order: Order = "query_first"
    query_tokens: Positive = 256
    chunk_tokens: Positive = 128
    rates: tuple[Positive, ...] = (16,)
    allocation: Literal["fixed", "proportional"] = "fixed"

    def __post_init__(self) -> None:
        if self.kind == "encoder" and not self.base_model:
            raise ValueError("base_model: an encoder compressor needs the name of its encoder")
        if self.kind == "n_layers" and self.base_model:
            raise ValueError("base_model: an n_layers compressor copies the generator; leave this empty")
        if not self.rates or len(set(self.rates)) != len(self.rates):
            raise ValueError("rates: give at least one rate and none twice")
        if max(self.rates) > self.chunk_tokens:
            raise ValueError(f"rates: {max(self.rates)} is over chunk_tokens ({self.chunk_tokens})")

    @property
    def max_memory_tokens(self) -> int:
        """Memory slots that exist: enough for a full chunk at the lowest rate."""
        return math.ceil(self.chunk_tokens / min(self.rates))

    def memory_tokens(self, chunk_tokens: int, rate: int) -> int:
        """How many memory embeddings a chunk of `chunk_tokens` generator tokens gets at `rate`; at least 1."""
        full = self.chunk_tokens if self.allocation == "fixed" else chunk_tokens
        return max(1, min(math.ceil(full / rate), chunk_tokens, self.max_memory_tokens))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Low-rank adapters on the generator's linear layers (OSCAR table 8: r 16, alpha 32, dropout 0.1).

    target_modules  last names of the layers' paths; null: all linear layers but the head. What a run saves, and a
                    checkpoint, names them
    """

    r: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    target_modules: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GeneratorConfig:
    """The causal language model that answers.

    lora      the adapter's settings; null where the base model is used as it is
    merged    the checkpoint holds all of the generator, adapter merged in, and needs no base model
    """

    base_model: str = "smollm2-135m"
    lora: LoraConfig | None = None
    merged: bool = False

    def __post_init__(self) -> None:
        if self.merged and self.lora is not None:
            raise ValueError("merged: a merged generator has no adapter of its own; lora must be null")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PromptConfig:
    """The words around the passages (OSCAR app. D) and the order of passages in the prompt.

    passage_order   `relevance`: best score first, by the compressor's own scores; `given`: the caller's order
    hybrid_top      how many best-scored passages `hybrid` shows as text too
    """

    system: str = (
        "You are a helpful assistant. Your task is to extract relevant information from provided documents "
        "and to answer questions as briefly as possible."
    )
    passage_order: Literal["given", "relevance"] = "given"
    hybrid_top: Positive = 1


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RelevanceConfig:
    """Calibration of relevance: probability = sigmoid(scale * score + bias) (Platt 1999).

    threshold       best calibrated relevance below which the question counts as not answerable; null: not calibrated
    """

    scale: FiniteFloat = 1.0
    bias: FiniteFloat = 0.0
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """All of a checkpoint's config.json. `trained` is false for a fresh checkpoint of `training init`."""

    format_version: Literal[1] = 1
    trained: bool = False
    compressor: CompressorConfig = dataclasses.field(default_factory=CompressorConfig)
    generator: GeneratorConfig = dataclasses.field(default_factory=GeneratorConfig)
    prompt: PromptConfig = dataclasses.field(default_factory=PromptConfig)
    relevance: RelevanceConfig = dataclasses.field(default_factory=RelevanceConfig)


def parse_config(kind: type[T], values: Any, source: str) -> T:
    """Build the dataclass `kind` from plain JSON or YAML `values`.

    `source` names where they came from, for the message. Raises ConfigError that lists every offending key.
    """
    try:
        # As JSON, in which a list may be a tuple and a mapping a dataclass though types are strict.
        return TypeAdapter(kind).validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise ConfigError(f"{source}: {'; '.join(map(_in_our_words, error.errors()))}") from None
    except (TypeError, ValueError, RecursionError) as error:  # YAML can say what JSON cannot, such as a date as a key
        raise ConfigError(f"{source}: {error}") from None


def _in_our_words(problem: Any) -> str:
    """One of pydantic's findings, the key first. The dataclasses' own ValueErrors begin with a key, too."""
    place = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "value_error":
            return f"{place}.{problem['ctx']['error']}" if place else str(problem["ctx"]["error"])
        case "unexpected_keyword_argument":
            words = "unknown key"
        case "missing":
            words = "is required"
        case "dataclass_type" | "dict_type":
            words = "must be a group of keys"
        case _:
            words = str(problem["msg"]).replace("Input should", "must", 1)
    return f"{place or 'top level'}: {words}"


def dump_config(config: Any) -> str:
    """`config` as JSON text, keys sorted, so that equal configurations give equal bytes."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True) + "\n"
