"""Models in transformers' folders: all of one, or a BaseModelError. Knows no checkpoints.

transformers raises whatever a malformed file makes it stumble over, fills weights that are missing with random numbers,
and takes the memory that a config asks for before it looks at the weights: some of it as soon as the config is read.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from core.base_models import BaseModel, first_line
from core.errors import BaseModelError, CheckpointError
from core.manifest import read_bounded
from core.tensor_files import read_header

MAX_LABELS = 4096
MAX_LAYERS = 1024  # where the number of tensors is not known; the deepest public models have some 130
# Numbers that configs make a list of as many entries of when they are read: num_hidden_layers, as the attribute maps of
# transformers' configs call it, and others that stand in their code.
LISTED = frozenset(
    {
        "num_hidden_layers",
        "decoder_num_hidden_layers",
        "encoder_layers",
        "decoder_layers",
        "num_encoder_blocks",
        "layers",
        "n_layer",
        "n_layers",
        "num_layers",
        "num_stages",
        "depth",
        "num_nextn_predict_layers",
        "num_mtp_layers",
        "first_k_dense_replace",
        "attention_types",
        "stage_num_blocks",
    }
)


def read_config(folder: Path, tensors: int | None = None) -> PretrainedConfig:
    """The config of the model in `folder`, whose weights are `tensors` tensors. Raises BaseModelError.

    One with more layers than tensors is refused before it is built, and so are those of unlikely sizes.
    """
    check_counts(folder, tensors)
    file = f"{folder.name}/config.json"
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise BaseModelError(f"{file}: is not a model's: {first_line(error, folder)}") from None
    layers = getattr(config, "num_hidden_layers", None)  # where the file says nothing, the kind's own
    if tensors is not None and isinstance(layers, int) and layers > tensors:
        raise BaseModelError(f"{file}: num_hidden_layers is {layers}, but the weights are {tensors} tensors")
    return config


def check_counts(folder: Path, tensors: int | None = None) -> None:
    """Check the numbers of layers and labels in config.json, for which transformers takes memory when it reads them.

    tensors  that the weights are: there are no more layers; None: not known

    Raises BaseModelError that names the key, nested or not.
    """
    file = f"{folder.name}/config.json"
    try:
        document = json.loads(read_bounded(folder / "config.json"))
    except (ValueError, RecursionError):
        raise BaseModelError(f"{file}: is not JSON") from None
    except CheckpointError as error:
        raise BaseModelError(f"{folder.name}/{error.message}") from None
    for key, value in _numbers(document):
        if key in LISTED and tensors is not None and value > tensors:
            raise BaseModelError(f"{file}: {key} is {value}, but the weights are {tensors} tensors")
        limit = MAX_LAYERS if key in LISTED else MAX_LABELS if key == "num_labels" else value
        if value > limit:
            raise BaseModelError(f"{file}: {key} is {value}, over the limit of {limit}")


def _numbers(document: Any) -> Iterator[tuple[str, int]]:
    """Every integer in a JSON document, with the key that it, or a list around it, stands under."""
    waiting: list[tuple[str, Any]] = [("", document)]  # not by recursion: a document may be nested deeply
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += [(key, each) for each in value]
        elif isinstance(value, int):
            yield key, value


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


def check_causal_size(folder: Path) -> None:
    """Check that the causal language model which config.json describes is no larger than model.safetensors.

    Neither is loaded. By the sum of all elements: transformers may store weights under other names than a model has.
    Raises BaseModelError, and CheckpointError where model.safetensors cannot be read.
    """
    held = read_header(folder / "model.safetensors")
    config = read_config(folder, len(held))
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
