"""Training configurations: dataclasses <- YAML <- `a.b=c` overrides, unknown keys refused. Nothing is trained here."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from core.config import STRICT, Config, LoraConfig, Mode, Positive, parse_config
from core.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["auto", "bf16", "fp32"]
RelevanceKind = Literal["mse", "mse_listwise", "bce", "bce_listwise"]
LABEL_KINDS = ("bce", "bce_listwise")  # they learn labels or probabilities, the others a teacher's scores


class Loader(yaml.SafeLoader):
    """Reads `2e-4` as the number that it is in YAML 1.2; in YAML 1.1, without a point, it is text."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """What is read, and how a row becomes an example.

    train, dev        files of rows, as `training prepare` and `training label` write them; `pretrain`: of texts
    logits            folder of the teacher's logits, as `training label --logits` writes them; for loss.kl
    passages          passages an example gets: all relevant ones first, then others, shuffled; 0: all of the row.
                      Answers on dev are from all of the row, as they would be served
    text_passages     how many of these an example in `text` mode keeps, whose prompts cost several times as much
    text_questions    most questions that share the passages of one text prompt: rows with the same relevant passages
                      are answered side by side, none seeing another, at little more than the cost of one
    empty_share       share of examples whose relevant passages are taken away: they train relevance only
    answer_tokens     longer target answers are cut
    prompt_tokens     examples whose generator prompt and answer are longer are skipped and counted
    modes             share of examples that reach the generator in each mode
    dev_questions     rows of `dev` used while training; 0: all
    on_bad_row        `skip`: count and report bad rows; `refuse`: stop before training
    autoencoding      `pretrain` only: share of texts to repeat; the others are to be continued
    """

    train: str = "data/train.jsonl"
    dev: str = "data/dev.jsonl"
    logits: str = ""
    passages: Annotated[int, Field(ge=0)] = 5
    text_passages: Positive | None = None
    text_questions: Positive = 1
    empty_share: Share = 0.0
    answer_tokens: Positive = 128
    prompt_tokens: Positive = 2048
    modes: dict[Mode, Share] = dataclasses.field(default_factory=lambda: {"compressed": 1.0})
    dev_questions: Annotated[int, Field(ge=0)] = 200
    on_bad_row: Literal["skip", "refuse"] = "skip"
    autoencoding: Share = 0.5

    def __post_init__(self) -> None:
        if not self.modes or sum(self.modes.values()) <= 0:
            raise ValueError("modes: give at least one mode a share above 0")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LossConfig:
    """Weights of the parts of the loss (OSCAR sec. 3.2 and 4.4); a part of weight 0 costs nothing.

    answer            cross entropy on the target answer's tokens
    kl                divergence from the teacher's stored top-k logits, at `kl_temperature`
    relevance         on relevance scores, a mean over passages: the paper's lambda, on a sum, times its 5 passages is
                      0.25; `relevance_kind`: `mse` to a teacher reranker's scores (the paper) or `mse_listwise`, which
                      also learns how they compare within a question; `bce` or `bce_listwise` to 0/1 labels or
                      probabilities
    alignment         pointer readout only: minus log of the probability that a pointer finds the answer's tokens
    """

    answer: Weight = 1.0
    kl: Weight = 0.0
    kl_temperature: Annotated[float, Field(gt=0)] = 1.0
    relevance: Weight = 0.05
    relevance_kind: RelevanceKind = "mse"
    alignment: Weight = 0.0

    @property
    def needs_generator(self) -> bool:
        """Whether the generator runs at all."""
        return self.answer > 0 or self.kl > 0

    @property
    def needs_compressor(self) -> bool:
        """Whether the compressor runs even where every passage is text."""
        return self.relevance > 0 or self.alignment > 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW with a linear schedule (OSCAR table 8). Rates of 0 freeze that part.

    compressor_lr       the compressor's backbone
    heads_lr            slots, readout and relevance head; null: as `compressor_lr`
    generator_lr        the generator's LoRA
    train_embeddings    also the compressor's input embedding table; large, and rarely worth it on small data
    compressor_dropout  whether the backbone's own dropout is on; off, attention runs fused and steps take a third less
    compressor_lora     train low-rank adapters in the backbone instead of all of it; merged when saved
    """

    compressor_lr: Weight = 5e-5
    heads_lr: Weight | None = None
    generator_lr: Weight = 1e-4
    train_embeddings: bool = True
    compressor_dropout: bool = True
    compressor_lora: LoraConfig | None = None
    warmup: Share = 0.05
    weight_decay: Weight = 0.1
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoopConfig:
    """The loop itself.

    batch_size          examples of one optimiser step, over all processes
    micro_batch_tokens  positions (compressor and generator together) of one forward and backward
    row_batch_tokens    padded positions of one pass of the compressor; smaller ones pad less, larger ones suit a GPU
    epochs, max_steps   whichever ends first; max_steps null: by epochs
    eval_every          steps between evaluations on dev; `patience`: evaluations without a better one before it stops
    save_every          steps between saves of `last/`: what a kill loses at most
    precision           `bf16`: bf16 autocast with float32 master weights; `fp32`; `auto`: bf16 where the hardware
                        computes in it, else fp32: a CPU without such instructions is ten times slower in bf16
    gradient_checkpointing  trade a second forward for activation memory
    """

    batch_size: Positive = 128
    micro_batch_tokens: Positive = 8192
    row_batch_tokens: Positive = 8192
    epochs: Positive = 1
    max_steps: Positive | None = None
    eval_every: Positive = 500
    patience: Positive | None = None
    save_every: Positive = 200
    log_every: Positive = 10
    precision: Precision = "auto"
    gradient_checkpointing: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """All of one run.

    start           the `best/` or `last/` of a run, or a checkpoint, to begin from; empty: base weights
    start_adapter   another such folder to take the generator's adapter from; empty: `start`'s, if it has one
    """

    start: str = ""
    start_adapter: str = ""
    model: Config = dataclasses.field(default_factory=Config)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        pointer = self.model.compressor.readout == "pointer"
        if not (self.loss.needs_generator or self.loss.needs_compressor):
            raise ValueError("loss: every part has weight 0, so there is nothing to train; give one a weight")
        if self.loss.alignment > 0 and not pointer:
            raise ValueError("loss.alignment: only a pointer readout attends to the answer's tokens; set it to 0")
        if self.loss.kl > 0 and not self.data.logits:
            raise ValueError("data.logits: loss.kl needs the folder of the teacher's logits")
        if self.optimizer.generator_lr > 0 and self.loss.needs_generator and self.model.generator.lora is None:
            raise ValueError("model.generator.lora: the generator is to be trained, so give its adapter's size")


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The run that a YAML file describes, with `a.b=c` overrides (values are YAML). Raises ConfigError."""
    values = read_yaml(path)
    for override in overrides:
        apply_override(values, override)
    return parse_config(TrainConfig, values, str(path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file, none where it is empty. Raises ConfigError."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text in UTF-8") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path}: must be a mapping of keys to values")
    return values or {}


def parse_yaml(text: str, source: str) -> Any:
    """What YAML `text` says. Raises ConfigError, in one line that begins with `source`."""
    try:
        return yaml.load(text, Loader=Loader)  # a safe one
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{source}{line}: not YAML: {getattr(error, 'problem', None) or 'malformed'}") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one dotted key of `values` in place from `a.b=c`. Raises ConfigError for a malformed override."""
    name, separator, text = override.partition("=")
    *parents, last = name.split(".")
    if not separator or not all([*parents, last]):
        raise ConfigError(f"{override!r}: an override is written a.b=c")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: {parent} is a value, not a group of keys")
    values[last] = parse_yaml(text, repr(override))


def dump_yaml(config: TrainConfig) -> str:
    """`config` as YAML that `load_config` reads back to an equal one."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False)
