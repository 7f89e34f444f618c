"""Retrieval with embedding models from transformers: dense bi-encoders and SPLADE. Knows no examples and no rows."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
from transformers.utils.hub import cached_file

from core.base_models import first_line, resolve_base_model
from core.demo_models import DEMO_MODELS
from core.errors import BaseModelError, ConfigError
from training.negatives import BM25Retriever, Retriever, Scores

MAX_TOKENS = 256
BATCH = 32


def make_retriever(name: str, texts: Sequence[str]) -> Retriever:
    """The retriever `bm25`, `dense:<model>` or `splade:<model>` over `texts`. Raises ConfigError, BaseModelError."""
    kind, _, model = name.partition(":")
    if kind == "bm25" and not model:
        return BM25Retriever(texts)
    if kind == "dense" and model:
        return EmbeddingRetriever(DenseEncoder(model), texts)
    if kind == "splade" and model:
        return EmbeddingRetriever(SpladeEncoder(model), texts)
    raise ConfigError(f"retriever: {name!r} is not bm25, dense:<model> or splade:<model>")


class _Encoder:
    """A transformers model in eval mode with its tokenizer, on a device; None: CUDA if there is any."""

    def __init__(self, auto: Any, model: str, device: str | None) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
            self.model = auto.from_pretrained(model, trust_remote_code=False, use_safetensors=True).eval()
        except (OSError, ValueError) as error:
            raise BaseModelError(f"retriever model {model}: cannot be loaded: {first_line(error)}") from None
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.to(self.device)

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The model's first output (B, T, ...) and the attention mask (B, T, 1) for a batch of texts."""
        batch = self.tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        batch = batch.to(self.device)
        return self.model(**batch)[0], batch["attention_mask"].unsqueeze(-1)


class DenseEncoder(_Encoder):
    """The last hidden states' mean, or the first of them where the model's 1_Pooling/config.json says so, unit length.

    The dot product is then the cosine (Reimers and Gurevych 2019). Raises BaseModelError for another pooling.
    """

    def __init__(self, model: str, device: str | None = None) -> None:
        super().__init__(AutoModel, model, device)
        self._first = _pools_first(model)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, d) float32."""
        hidden, mask = self.forward(texts)
        first = mask.cumsum(dim=1) == 1 if self._first else True  # (B, T, 1), under any padding
        weights = mask * first
        mean = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)  # (B, d)
        return torch.nn.functional.normalize(mean, dim=-1)

    def windows(self, text: str) -> list[str]:
        """`text` in pieces of as many tokens as the model reads at once."""
        pieces = self.tokenizer(
            text, truncation=True, max_length=MAX_TOKENS, return_overflowing_tokens=True, return_offsets_mapping=True
        )["offset_mapping"]  # (windows, T, 2); an added token covers nothing
        if len(pieces) == 1:
            return [text]
        spans = [[span for span in piece if span[1]] for piece in pieces]
        return [text[piece[0][0] : piece[-1][1]] for piece in spans]


def load_dense(name: str, device: str | None = None) -> DenseEncoder:
    """The encoder of a demo model's name, a folder or a hub id. Raises BaseModelError."""
    # from the hub by its id: a base model's folder lacks what says how a sentence encoder pools
    return DenseEncoder(str(resolve_base_model(name).path) if name in DEMO_MODELS else name, device)


@torch.inference_mode()
def best_cosines(encode: DenseEncoder, query: str, texts: Sequence[str]) -> list[float]:
    """Cosine of the query and each text; of a long one the best of its windows."""
    windows = [(index, window) for index, text in enumerate(texts) for window in encode.windows(text)]
    read = [query, *(window for _, window in windows)]
    vectors = torch.cat(
        [encode(read[start : start + BATCH]) for start in range(0, len(read), BATCH)]
    )  # (1 + windows, d)
    best = [-1.0] * len(texts)
    for (index, _), cosine in zip(windows, (vectors[1:] @ vectors[0]).tolist(), strict=True):
        best[index] = max(best[index], cosine)
    return best


def _pools_first(model: str) -> bool:
    """Whether a sentence encoder was trained with its first token as the text's embedding, not with the mean of all."""
    try:
        file = cached_file(model, "1_Pooling/config.json")
    except OSError:
        file = None
    if file is None:  # it does not say
        return False
    values = json.loads(Path(file).read_text(encoding="utf-8"))
    marker = "pooling_mode_"
    modes = {key.removeprefix(marker) for key, value in values.items() if key.startswith(marker) and value is True}
    if modes not in ({"cls_token"}, {"mean_tokens"}):
        raise BaseModelError(f"retriever model {model}: pools by {', '.join(modes)}, not by cls_token or mean_tokens")
    return modes == {"cls_token"}


class SpladeEncoder(_Encoder):
    """Largest log(1 + relu(logit)) of each vocabulary word over the text (SPLADE v2, Formal et al. 2021, eq. 6)."""

    def __init__(self, model: str, device: str | None = None) -> None:
        super().__init__(AutoModelForMaskedLM, model, device)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, vocabulary) float32, nearly all zeros in a trained model."""
        logits, mask = self.forward(texts)
        return (torch.log1p(torch.relu(logits.float())) * mask).amax(dim=1)


class EmbeddingRetriever:
    """Dot products of queries with texts that were embedded once; SPLADE's wide vectors are kept sparse."""

    def __init__(self, encode: DenseEncoder | SpladeEncoder, texts: Sequence[str]) -> None:
        self._encode = encode
        self._sparse = isinstance(encode, SpladeEncoder)
        starts = tqdm(range(0, len(texts), BATCH), desc="embedding passages", disable=None)
        parts = [self._embed(texts[start : start + BATCH]) for start in starts]
        self._texts = torch.cat([part.to_sparse() for part in parts] if self._sparse else parts)  # (N, d)

    def scores(self, queries: Sequence[str]) -> Iterator[Scores]:
        """For each query its scores, float32 (N,)."""
        for start in range(0, len(queries), BATCH):
            embedded = self._embed(queries[start : start + BATCH])  # (B, d)
            for scores in (self._texts @ embedded.T).T:  # (B, N)
                yield np.asarray(scores.numpy(), dtype=np.float32)

    @torch.inference_mode()
    def _embed(self, texts: Sequence[str]) -> Tensor:
        return self._encode(texts).cpu()
