"""Relevance scores from a cross-encoder: query and passage read together. Knows no rows and no files."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from core.base_models import first_line
from core.errors import BaseModelError

Pair = tuple[str, str]


class CrossEncoder:
    """Any sequence classifier with one score, or with two classes of which the second is "relevant"."""

    def __init__(self, model: str, *, device: str = "cpu", max_tokens: int = 512, batch: int = 32) -> None:
        """Load from a folder or hub id. Raises BaseModelError."""
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            loaded = AutoModelForSequenceClassification.from_pretrained(
                model, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise BaseModelError(f"cross-encoder {model}: cannot be loaded: {first_line(error)}") from None
        if loaded.config.num_labels not in (1, 2):
            raise BaseModelError(f"cross-encoder {model}: has {loaded.config.num_labels} labels, not 1 or 2")
        self._model = loaded.eval().to(device)
        self._max_tokens = max_tokens
        self._batch = batch

    @torch.inference_mode()
    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        """The raw score (a logit) of each `(query, passage)`, in order; only the passage is cut where too long.

        Of queries that it `reads`. Pairs of like length share a batch, so that little of it is padding.
        """
        order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index][1]))
        scores = [0.0] * len(pairs)
        for start in range(0, len(order), self._batch):
            indices = order[start : start + self._batch]
            batch = self._tokenizer(
                [pairs[index][0] for index in indices],
                [pairs[index][1] for index in indices],
                padding=True,
                truncation="only_second",
                max_length=self._max_tokens,
                return_tensors="pt",
            ).to(self._model.device)
            logits = self._model(**batch).logits.float()  # (B, 1) or (B, 2)
            values = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
            for index, value in zip(indices, values.tolist(), strict=True):
                scores[index] = value
        return scores

    def reads(self, query: str) -> bool:
        """Whether a query leaves room for a token of the passage."""
        tokens = len(self._tokenizer(query, add_special_tokens=False, verbose=False)["input_ids"])
        return tokens + self._tokenizer.num_special_tokens_to_add(pair=True) < self._max_tokens
