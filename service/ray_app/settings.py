"""The settings that only the Ray Serve application has. Knows no Ray."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from core.errors import ConfigError
from service.settings import PREFIX, Count, Seconds, Settings, check_environment, check_keys, explain

Target = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class RaySettings(Settings):
    """Those of the service, and how many replicas there are to be. Host and port are those of Ray's proxy."""

    compressor_min_replicas: Count = Field(default=1, description="compressor replicas there always are")
    compressor_max_replicas: Count = Field(default=4, description="most compressor replicas")
    compressor_target_requests: Target = Field(
        default=16, description="requests that wait or run in a compressor replica, above which another is started"
    )
    generator_min_replicas: Count = Field(default=1, description="generator replicas there always are")
    generator_max_replicas: Count = Field(default=4, description="most generator replicas")
    generator_target_requests: Target = Field(
        default=16, description="requests that wait or run in a generator replica, above which another is started"
    )
    upscale_seconds: Seconds = Field(default=30, description="how long it has to be too much before one is started")
    downscale_seconds: Seconds = Field(default=600, description="how long it has to be too little before one is ended")
    replica_cpus: Share = Field(default=1, description="CPUs that Ray sets aside for each replica")
    compressor_gpus: Share = Field(default=0, description="GPUs of a compressor replica; with SCALEDOWN_DEVICE=cuda")
    generator_gpus: Share = Field(default=0, description="GPUs of a generator replica; with SCALEDOWN_DEVICE=cuda")

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        for kind in ("compressor", "generator"):
            if getattr(self, f"{kind}_min_replicas") > getattr(self, f"{kind}_max_replicas"):
                raise ValueError(f"{kind}_min_replicas is over {kind}_max_replicas")
        return self

    @property
    def generates_on_graphs(self) -> bool:
        """No: an accelerator's replicas compress."""
        return False

    def of_ingress(self) -> Self:
        """What the ingress goes by: it runs no model, so it needs no device."""
        return self.model_copy(update={"device": "cpu", "accelerator": "eager", "quantize": None, "workers": 1})

    def of_compressor(self) -> Self:
        """What a compressor replica goes by: keys, and the cache of embeddings, are the ingress's."""
        away = {"api_keys": (), "admin_key": None, "embedding_cache_bytes": 0}
        return self.model_copy(update={**away, "engine": None, "generator_url": "", "generator_key": None})

    def of_generator(self) -> Self:
        """What a generator replica goes by: an accelerator's graphs are the compressor's, as is the document cache."""
        return self.of_compressor().model_copy(update={"accelerator": "eager", "document_cache_bytes": 0})


def read_settings(values: Mapping[str, str]) -> RaySettings:
    """The settings of `name=value` pairs and the environment. Raises ConfigError that says what is wrong."""
    known = {PREFIX + name.upper() for name in RaySettings.model_fields}
    check_environment([name for name in os.environ if name.upper() not in known])
    try:
        given: dict[str, Any] = dict(values)  # texts, which pydantic parses
        settings = RaySettings(**given)
        check_keys(settings)
        return settings
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
