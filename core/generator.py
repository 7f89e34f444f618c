"""The generator: a causal language model that reads memory embeddings among its tokens. Knows no prompts, no decoding.

Also merges low-rank adapters into its weights (LoRA, arXiv 2106.09685, eq. 3), so that serving needs no peft.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from core.attention import GROUPED
from core.base_models import BaseModel, first_line
from core.config import LoraConfig
from core.errors import BaseModelError, CheckpointError
from core.pretrained import check_counts, load_pretrained
from core.prompts import end_of_turn_id
from core.tokenization import load_tokenizer

ADAPTER_PREFIX = "base_model.model."  # what peft puts before a module's path
ATTENTION_KINDS = {"full_attention", "sliding_attention"}
# What some models (Granite, Cohere, Falcon-H1, Gemma) do to logits behind their head.
LOGIT_FACTORS = ("logits_scaling", "logit_scale", "lm_head_multiplier", "output_multiplier")
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap")


class Generator(nn.Module):
    """A causal language model with its tokenizer.

    hidden_size  width d of its input embeddings
    eos_ids      tokens that end an answer: the model's, its tokenizer's and its chat template's end of turn
    max_tokens   positions the model was made for, prompt and answer together
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.hidden_size = self._embedding_weight.shape[1]
        self.eos_ids = _eos_ids(model, tokenizer)
        self.max_tokens: int = getattr(model.config, "max_position_embeddings", None) or 2**31

    @property
    def device(self) -> torch.device:
        """Where the input embeddings are."""
        return self._embedding_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the input embeddings."""
        return self._embedding_weight.dtype

    @property
    def _embedding_weight(self) -> Tensor:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, Tensor)  # every causal model of transformers keeps one table
        return weight

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings `(..., d)` of token `ids` `(...)` int64."""
        embeddings: Tensor = self.model.get_input_embeddings()(ids)
        return embeddings

    def splice(self, ids: Tensor, memory_mask: Tensor, memory: Tensor) -> Tensor:
        """Input embeddings `(B, T, d)` with `memory` in place of the tokens where `memory_mask` is true.

        ids          (B, T) int64
        memory_mask  (B, T) bool
        memory       (M, d), M = memory_mask.sum(), in row-major order of the true positions; gradients reach it

        Raises ValueError where the number of embeddings or their width does not fit.
        """
        embeddings = self.embed(ids)
        wanted = (int(memory_mask.sum()), self.hidden_size)
        if wanted[0] == 0 and memory.shape[0] == 0:
            return embeddings
        if tuple(memory.shape) != wanted:
            raise ValueError(f"memory must be {wanted}, as the mask asks, not {tuple(memory.shape)}")
        # (B, T, 1) broadcasts over d: masked_scatter fills true places in row-major order.
        return embeddings.masked_scatter(memory_mask.unsqueeze(-1), memory.to(embeddings.dtype))

    def hidden_states(
        self, embeddings: Tensor, *, mask: Tensor | dict[str, Tensor] | None, positions: Tensor, cache: object
    ) -> Tensor:
        """Final hidden states `(B, T, d)` of `embeddings` `(B, T, d)`, past keys and values in `cache`.

        mask       additive `(B, 1, T, K)`, by kind of layer where the model mixes them; None: causal
        positions  (B, T) or (1, T) int64
        """
        decoder = self.model.get_decoder()
        output = decoder(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def next_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits `(n, V)` of final hidden states `(n, d)`: the head runs where a token is wanted only."""
        head: nn.Module = self.model.get_output_embeddings()
        logits: Tensor = head(hidden)
        return logits


def load_generator(
    base: BaseModel, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Generator:
    """Load the frozen causal language model in `base.path`. Raises BaseModelError where it cannot be used."""
    check_counts(base.path)
    tokenizer = load_tokenizer(base.path)
    model = load_pretrained(
        AutoModelForCausalLM, base, "a causal language model", dtype=dtype, attn_implementation=GROUPED
    )
    unknown = set(getattr(model.config, "layer_types", None) or ()) - ATTENTION_KINDS
    if unknown:
        raise BaseModelError(f"{base.name} has layers of kind {', '.join(sorted(unknown))}, which cannot be served")
    _check_logits(model, base)
    try:
        generator = Generator(model, tokenizer)
    # An encoder's tokenizer has no end of a turn; and a chat template is a program, which may raise anything.
    except Exception as error:
        raise BaseModelError(f"{base.name} cannot be a generator: {first_line(error)}") from None
    return generator.to(device).eval().requires_grad_(False)


def _check_logits(model: PreTrainedModel, base: BaseModel) -> None:
    """Raises BaseModelError for a model whose logits are not what its head gives, which is all that is run here."""
    config = model.config.get_text_config(decoder=True)
    for names, nothing in ((LOGIT_FACTORS, (None, 1)), (LOGIT_CAPS, (None, 0))):
        for name in names:
            value = getattr(config, name, None)
            if value not in nothing:
                raise BaseModelError(f"{base.name} has {name} {value} in config.json, which cannot be served")


@torch.no_grad()
def merge_lora(model: nn.Module, tensors: Mapping[str, Tensor], lora: LoraConfig) -> None:
    """Add adapters in peft's naming into `model`'s weights: `W += alpha / r * B @ A`, computed in float32.

    tensors  `base_model.model.<module>.lora_A.weight` (r, in) and `...lora_B.weight` (out, r), for every linear
             layer that `lora` adapts

    Raises CheckpointError, before any weight is changed, for a key that is missing, unknown, of the wrong shape or
    not finite.
    """
    _check_adapter(tensors, adapter_shapes(model, lora))
    for name, layer in target_layers(model, lora).items():
        down, up = (tensors[f"{ADAPTER_PREFIX}{name}.lora_{side}.weight"] for side in "AB")
        delta = up.to(layer.weight.device, torch.float32) @ down.to(layer.weight.device, torch.float32)
        layer.weight.copy_(layer.weight.float() + lora.alpha / lora.r * delta)


def adapter_shapes(model: nn.Module, lora: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Names, as peft has them, and shapes of the tensors that an adapter of `model` has."""
    return {
        f"{ADAPTER_PREFIX}{name}.lora_{side}.weight": shape
        for name, layer in target_layers(model, lora).items()
        for side, shape in (("A", (lora.r, layer.in_features)), ("B", (layer.out_features, lora.r)))
    }


def target_layers(model: nn.Module, lora: LoraConfig) -> dict[str, nn.Linear]:
    """The layers of `model` that `lora` adapts, by path. Raises CheckpointError where there are none."""
    names = name_targets(model, lora).target_modules or ()
    layers = linear_layers(model)
    targets = {path: layer for path, layer in layers.items() if path.rpartition(".")[2] in names}
    if not targets:
        asked = f"named {', '.join(names)}" if names else "to adapt: none is named, or there is none but the head"
        raise CheckpointError(f"the generator has no linear layer {asked}")
    return targets


def name_targets(model: nn.Module, lora: LoraConfig) -> LoraConfig:
    """`lora` with the layers named that it adapts: in place of null, all linear layers of `model` but the head."""
    if lora.target_modules is not None:
        return lora
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    inner = {path: layer for path, layer in linear_layers(model).items() if layer is not head}
    return replace(lora, target_modules=tuple(last_names(inner)))


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """All linear layers by path; not what only acts as one, such as experts fused into one tensor, or Conv1D."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def last_names(paths: Iterable[str]) -> list[str]:
    """The last names of modules' paths, as `target_modules` has them: sorted, each once."""
    return sorted({path.rpartition(".")[2] for path in paths})


def _check_adapter(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    unknown, missing = sorted(tensors.keys() - expected.keys()), sorted(expected.keys() - tensors.keys())
    if unknown:
        raise CheckpointError(f"the generator's adapter has {len(unknown)} unknown keys, first {unknown[0]}")
    if missing:
        raise CheckpointError(f"the generator's adapter lacks {len(missing)} keys, first {missing[0]}")
    for key, shape in expected.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"the generator's adapter has shape {tuple(tensor.shape)} for {key}, not {shape}")
        if not tensor.isfinite().all():
            raise CheckpointError(f"the generator's adapter has values that are not finite in {key}")


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ids = {end_of_turn_id(tokenizer)}
    generation_config = getattr(model, "generation_config", None)
    for source in (generation_config, model.config, tokenizer):
        eos = getattr(source, "eos_token_id", None)
        ids.update(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    return frozenset(ids)
