"""Which model the service starts with, and the first requests that warm it. Knows no HTTP."""

import logging
from pathlib import Path

import torch

from core.accelerators import ACCELERATORS
from core.accelerators.artifact import accelerate
from core.accelerators.generator_artifact import accelerate_generator
from core.accelerators.record import stored_dtype
from core.answer import answer
from core.checkpoint import load_checkpoint
from core.compute_dtype import best_dtype
from core.config import Config, GeneratorConfig
from core.costs import measure_token_costs
from core.errors import ConfigError
from core.links import followed
from core.model import Model, build_model
from core.packed_linear import pack_model
from core.passages import Passage
from core.policy import TokenCosts
from core.quantization import quantise
from core.sampling import GenerationOptions
from service.settings import SHIPPED, Settings
from service.weights import keep_compressor

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def configured_folder(settings: Settings) -> Path | None:
    """The folder that the settings name, else the shipped checkpoint's, links followed; None: an untrained model."""
    folder = settings.checkpoint or (SHIPPED if SHIPPED.is_dir() else None)
    return folder and followed(folder)


def load_model(settings: Settings, folder: Path | None = None) -> Model:
    """The model of `folder`, or of the settings: their checkpoint, the shipped one, or an untrained one.

    Raises CheckpointError, BaseModelError and ConfigError.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    check_device(settings.device)
    if settings.quantize is not None and settings.accelerator != "eager":
        raise ConfigError(f"quantize: the graphs of accelerator {settings.accelerator} are not quantised; drop one")
    folder = folder or configured_folder(settings)
    dtype = compute_dtype(settings, folder)
    if folder is not None:
        model = load_checkpoint(folder, device=settings.device, dtype=dtype)
        if settings.accelerator != "eager":
            _take_graphs(model, folder, settings)
    elif settings.accelerator != "eager":
        raise ConfigError(f"accelerator: {settings.accelerator} runs the graphs of a checkpoint, and there is none")
    else:
        config = Config(generator=GeneratorConfig(base_model=settings.base_model))
        model = build_model(config, device=settings.device, dtype=dtype)
    if settings.quantize is not None:
        quantise(model)
    elif settings.accelerator == "eager":
        pack_model(model)
    if settings.compressor_token_us is not None and settings.prefill_token_us is not None:
        model.costs = TokenCosts(settings.compressor_token_us / 1e6, settings.prefill_token_us / 1e6)
    if not model.config.trained:
        log.warning(
            "this model is untrained: text mode answers like its base model, compressed mode does not make sense yet",
            extra={"checkpoint": model.name},
        )
    return model


def check_device(device: str) -> None:
    """Refuse a device that is not there, before anything is loaded. Raises ConfigError that says what to do."""
    if not device.startswith("cuda"):
        return
    other, count = "or give --device cpu", torch.cuda.device_count()
    if not torch.backends.cuda.is_built():
        raise ConfigError(
            f"device: {device} is asked for, but this torch has no CUDA ({torch.__version__}): install a CUDA build, "
            f"`make clean && make setup TORCH_INDEX=`, {other}"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device: {device} is asked for, but torch finds no GPU: see that `nvidia-smi` lists one, {other}"
        )
    if int(device.partition(":")[2] or 0) >= count:
        raise ConfigError(
            f"device: {device} is asked for, but the last GPU here is cuda:{count - 1}: give that, {other}"
        )


def _take_graphs(model: Model, folder: Path, settings: Settings) -> None:
    """Run the compressor on the checkpoint's graphs, and the generator too where it is here and has some."""
    accelerator = ACCELERATORS[settings.accelerator]()
    model.accelerated = accelerate(model, folder, accelerator)
    graphs = accelerate_generator(model, folder, accelerator) if settings.generates_on_graphs else None
    if graphs is not None:
        model.generator_graphs = graphs.passes
        model.generator.max_tokens = graphs.buckets.capacity  # what limits and plans go by


def compute_dtype(settings: Settings, folder: Path | None = None) -> torch.dtype:
    """What `auto` stands for here: for an accelerator, the format that the graphs of `folder` were made in.

    Raises CheckpointError where it has none.
    """
    if settings.dtype != "auto":
        return DTYPES[settings.dtype]
    if settings.accelerator == "eager" or folder is None:
        return best_dtype(torch.device(settings.device))
    return stored_dtype(folder)


def load_to_serve(settings: Settings, folder: Path | None) -> Model:
    """The model of `load_model`, warm; where a vLLM server writes the answers, without the generator's layers.

    They are needed before that, to repeat the golden example; a model without one keeps them. Raises as `load_model`.
    """
    model = load_model(settings, folder)
    warm_up(model)
    if settings.generator_url and model.config.generator.lora is not None:
        log.warning(
            "this checkpoint's adapter is not merged: the vLLM server has to serve the `generator` folder that "
            "`python -m training export <this checkpoint> <another folder> --merge` writes",
            extra={"checkpoint": model.name},
        )
    if settings.generator_url and model.golden is not None:
        keep_compressor(model)
    return model


def warm_up(model: Model) -> None:
    """Run every stage once, so that no caller pays for what the first request sets up, and measure what tokens cost."""
    passages = [Passage("Iron melts at 1538 °C."), Passage("Tin melts at 232 °C. " * 20)]
    answer(model, "What melts first?", passages, "hybrid", options=GenerationOptions(max_new_tokens=2))
    if model.costs is None:
        model.costs = measure_token_costs(model)
