"""Models in transformers' folders: all of one, or a BaseModelError. Knows no checkpoints.

transformers raises whatever a malformed file makes it stumble over, fills weights that are missing with random numbers,
and takes the memory that a config asks for before it looks at the weights.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from core.base_models import BaseModel, first_line
from core.errors import BaseModelError
from core.tensor_files import read_header


def read_config(folder: Path) -> PretrainedConfig:
    """The config of the model in `folder`. Raises BaseModelError."""
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise BaseModelError(f"{folder.name}/config.json: is not a model's: {first_line(error, folder)}") from None
    return config


def load_pretrained(kind: Any, base: BaseModel, what: str, unneeded: str = "", **options: Any) -> PreTrainedModel:
    """The model in `base.path`, by the auto class `kind`, with every weight from there.

    what      it is to be, for the message
    unneeded  weights whose names begin so may be missing
    options   for `from_pretrained`

    Raises BaseModelError, which names the first weight that is missing or of another shape.
    """
    try:
        model, found = kind.from_pretrained(
            base.path,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    except Exception as error:
        said = first_line(error, base.path)
        raise BaseModelError(f"{base.name} cannot be loaded as {what}: {said}") from None
    for name, shape, wanted in sorted(found["mismatched_keys"]):
        said = f"{name} has shape {tuple(shape)}, not {tuple(wanted)} as in config.json"
        raise BaseModelError(f"{base.name} cannot be loaded as {what}: {said}")
    missing = sorted(name for name in found["missing_keys"] if not (unneeded and name.startswith(unneeded)))
    if missing:
        said = f"its weights lack {len(missing)} tensors, first {missing[0]}"
        raise BaseModelError(f"{base.name} cannot be loaded as {what}: {said}")
    assert isinstance(model, PreTrainedModel)  # what every auto class makes
    return model


def check_layers(config: PretrainedConfig, tensors: int) -> None:
    """Raises BaseModelError where `config` has more layers than there are tensors: to build one takes time."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > tensors:
        raise BaseModelError(f"config.json: num_hidden_layers is {layers}, but the weights are {tensors} tensors")


def check_causal_size(folder: Path) -> None:
    """Check that the causal language model which config.json describes is no larger than model.safetensors.

    Neither is loaded. By the sum of all elements: transformers may store weights under other names than a model has.
    Raises BaseModelError, and CheckpointError where model.safetensors cannot be read.
    """
    held = read_header(folder / "model.safetensors")
    config = read_config(folder)
    check_layers(config, len(held))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:
        raise BaseModelError(f"{folder.name}/config.json: no model can be built of it: {first_line(error)}") from None
    wanted = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(shape.numel() for shape, _ in held.values())
    if wanted > stored:
        raise BaseModelError(
            f"{folder.name}/config.json: describes {wanted} weights, but model.safetensors has {stored}"
        )
