"""Every knob of the service, read from `SCALEDOWN_*` environment variables or given as keywords. Knows no models."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import DirectoryPath, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from core.errors import ConfigError, ScaledownError
from service.listening import is_loopback

PREFIX = "SCALEDOWN_"
SHIPPED = Path(__file__).parent.parent / "checkpoints" / "demo"

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ServedName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*$", max_length=128)]
EarlierMessages = Literal["refuse", "ignore", "prepend"]


class Settings(BaseSettings):
    """All settings. The description of a field is its `--help` text; the flag of `max_passages` is `--max-passages`.

    A variable that is set to nothing counts as unset: compose files and manifests cannot leave one out.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one and logs it")

    workers: int = Field(
        default=1,
        ge=1,
        le=64,
        description="processes that serve; each loads the weights and has every limit below, but for --threads, to "
        "itself",
    )

    checkpoint: Path | None = Field(
        default=None, description="checkpoint folder; unset: checkpoints/demo if it exists, else an untrained model"
    )
    checkpoint_root: DirectoryPath | None = Field(
        default=None, description="folder of checkpoints that may be swapped in; unset: the folder `checkpoint` is in"
    )
    base_model: str = Field(
        default="smollm2-135m", description="generator of the untrained model, when there is no checkpoint"
    )
    engine: Literal["torch", "vllm"] | None = Field(
        default=None,
        description="what writes the answers: torch here, or a vLLM server; unset: vllm where there is a generator_url",
    )
    generator_url: str = Field(
        default="",
        pattern=r"^(https?://[^/?#@]+(/[^?#]*)?)?$",
        description="vLLM server started with --enable-prompt-embeds, such as http://gpu:8001/v1",
    )
    generator_model: str = Field(default="", description="name of the model there; unset: the only one it serves")
    generator_key: SecretStr | None = Field(default=None, description="key that server asks for, if any")
    device: str = Field(
        default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="where the model runs: cpu, cuda, cuda:1"
    )
    accelerator: Literal["eager", "jit", "neuron"] = Field(
        default="eager",
        description="what runs the compressor, and the generator where the checkpoint has its graphs; jit and neuron: "
        "graphs in the checkpoint (`training export --target`)",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="number format of the weights; auto: bfloat16 where the CPU or GPU computes in it, else float32; "
        "with an accelerator, what its graphs were made in",
    )
    quantize: Literal["int8"] | None = Field(
        default=None,
        description="int8: linear layers multiply in int8, by torchao (the extra `int8`); the golden example is "
        "compared with a wider tolerance; slower than bfloat16 on a CPU that multiplies that",
    )
    threads: int = Field(
        default=0, ge=0, description="CPU threads of one operation, shared out among the workers; 0: torch decides"
    )
    keep_checkpoints: int = Field(default=1, ge=0, description="earlier checkpoints kept in memory to roll back to")
    max_model_bytes: int = Field(
        default=0, ge=0, description="memory for all loaded checkpoints together; 0: what the machine has free"
    )
    load_seconds: Seconds = Field(
        default=1800,
        description="time another checkpoint has to be loaded in; it is refused then, and the one that serves stays",
    )
    watch_seconds: float = Field(
        default=0,
        ge=0,
        description="how often to look whether the link `checkpoint` points elsewhere; 0: only on SIGHUP",
    )

    max_body_bytes: Count = Field(default=16 * 2**20, description="largest request body in bytes")
    max_buffered_bytes: Count = Field(default=256 * 2**20, description="request bodies held at one time, in bytes")
    body_seconds: Seconds = Field(default=30, description="time a client has to send its whole body")
    max_json_depth: Count = Field(default=16, description="deepest nesting of a JSON body")
    max_query_chars: Count = Field(default=8192, description="longest query in characters")
    max_passages: Count = Field(default=200, description="most passages in a request")
    max_passage_chars: Count = Field(default=400_000, description="longest passage, with its title, in characters")
    max_request_tokens: Count = Field(default=131_072, description="most generator tokens in all passages of a request")
    max_new_tokens: Count = Field(default=512, description="longest answer a caller may ask for, in tokens")
    max_stop: Count = Field(default=8, description="most stop strings in a request")
    timeout_seconds: Seconds = Field(default=120, description="deadline of a request that names none")
    max_timeout_seconds: Seconds = Field(default=600, description="longest deadline a caller may ask for")

    served_model_names: Annotated[tuple[ServedName, ...], NoDecode] = Field(
        default=(),
        max_length=16,
        description="comma-separated further names by which `model` of an OpenAI request may name the checkpoint that "
        "serves, such as gpt-4o-mini",
    )
    earlier_messages: EarlierMessages = Field(
        default="refuse",
        description="what a chat that does not say has done with system messages and earlier turns: refuse (the "
        "request), ignore, or prepend (to the question, as text)",
    )

    max_requests: Count = Field(default=256, description="requests in the service at one time")
    max_tokens_in_flight: Count = Field(default=262_144, description="tokens of all admitted requests together")
    overload_status: Literal[429, 503] = Field(default=429, description="status of a request there is no room for")
    compressor_token_us: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="microseconds a token costs the compressor, for mode auto"
    )
    prefill_token_us: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="microseconds a prompt token costs the generator; unless both are set, they are measured at start",
    )
    batch_tokens: Count = Field(default=4096, description="tokens of one compression batch, padding included")
    batch_wait_ms: float = Field(
        default=2, ge=0, le=100, description="how long an idle worker waits for company, in ms"
    )
    prefill_tokens: Count = Field(default=8192, description="prompt tokens that join the running decode batch at once")
    max_sequences: Count = Field(default=16, description="answers generated at one time")
    kv_tokens: Count = Field(
        default=65_536, description="positions of all running answers, each counted as long as the longest"
    )
    tokenizer_threads: Count = Field(default=2, description="threads that tokenise requests")
    store_bytes: int = Field(
        default=256 * 2**20, ge=0, description="memory for embeddings kept by embedding_id; 0: none kept"
    )
    embedding_cache_bytes: int = Field(
        default=64 * 2**20, ge=0, description="memory for embeddings of equal query and chunk; 0: each is computed"
    )
    document_cache_bytes: int = Field(
        default=512 * 2**20,
        ge=0,
        description="memory for chunks read before their query, where the checkpoint does so; 0: none kept",
    )
    document_cache_folder: Path | None = Field(
        default=None, description="folder for such chunks, which processes may share; unset: memory only"
    )
    document_cache_folder_bytes: Count = Field(
        default=8 * 2**30, description="size of that folder; the least recently used chunks are removed"
    )
    document_cache_redis: SecretStr | None = Field(
        default=None, description="redis:// or rediss:// URL for such chunks, which machines may share"
    )

    keepalive_seconds: Seconds = Field(default=15, description="silence on a stream before a keep-alive comment")
    drain_seconds: Seconds = Field(default=30, description="time running requests get after SIGTERM")
    stall_seconds: Seconds = Field(default=300, description="a worker this long on one step is taken for dead")

    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        default=(), description="comma-separated keys, each plain or as sha256:<hex>; none: no key is asked for"
    )
    admin_key: SecretStr | None = Field(
        default=None, description="key of /admin, plain or sha256:<hex>; unset: /admin is off"
    )
    otlp_endpoint: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="OpenTelemetry collector (OTLP over HTTP) that gets traces, such as http://collector:4318; unset: "
        "the standard OTEL_EXPORTER_OTLP_* variables, and without them no traces",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe log line shown"
    )

    @property
    def generates_on_graphs(self) -> bool:
        """Whether the generator is here, to run on the graphs that a checkpoint may have of it."""
        return not self.generator_url

    @field_validator("api_keys", "served_model_names", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("api_keys", "admin_key")
    @classmethod
    def _check_keys(cls, value: Any) -> Any:
        for key in value if isinstance(value, tuple) else [value] * (value is not None):
            text = key.get_secret_value()
            if text.startswith("sha256:") and not re.fullmatch(r"sha256:[0-9a-f]{64}", text):
                raise ValueError("sha256: must be followed by 64 lower-case hexadecimal digits")
            if len(text) < 16:
                raise ValueError("a key needs at least 16 characters")
        return value

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine is not None and (self.engine == "vllm") != bool(self.generator_url):
            raise ValueError("engine vllm and generator_url go together")
        return self


def explain(error: ValidationError | ScaledownError) -> str:
    """Why a command cannot start, for the operator: a line for each setting that is wrong."""
    if isinstance(error, ScaledownError):
        return error.message
    return "\n".join(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors())


def open_to_others(settings: Settings) -> bool:
    """Whether callers from other machines need no key."""
    return not settings.api_keys and not is_loopback(settings.host)


def check_keys(settings: Settings) -> None:
    """Refuse to be open to others where a client's key is set: its name differs from the service's by one letter.

    Raises ConfigError.
    """
    if os.environ.get(PREFIX + "API_KEY") and open_to_others(settings):
        raise ConfigError(f"{PREFIX}API_KEY is what a client sends: set {PREFIX}API_KEYS, or anyone may call")


def check_environment(names: Sequence[str] | None = None) -> None:
    """Refuse `SCALEDOWN_*` variables that mean nothing: a typing error would otherwise leave a limit at its default.

    Those of the client mean nothing here, and are nobody's error.

    Raises ConfigError that names them. `names` defaults to the environment's.
    """
    known = {PREFIX + name.upper() for name in (*Settings.model_fields, "url", "api_key")}
    ours = (name for name in (os.environ if names is None else names) if name.upper().startswith(PREFIX))
    unknown = sorted(name for name in ours if name.upper() not in known)
    if unknown:
        raise ConfigError(f"unknown settings in the environment: {', '.join(unknown)}")
