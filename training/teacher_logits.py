"""A teacher's top-k log-probabilities on disk: one safetensors shard a block of rows. Knows no models.

A shard holds, for its rows one after the other: `offsets` (rows + 1) int64 into the tokens; `answer_ids` (tokens)
int32; `top_ids` (tokens, k) int32; `top_logprobs` (tokens, k) float16. Its metadata names the rows and the tokenizer.
Six bytes a candidate: 100,000 answers of 10 tokens with k = 32 take about 200 MB.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.data_quality import DataError

SHARD_PATTERN = "shard-*.safetensors"


@dataclass(frozen=True, slots=True)
class TokenTargets:
    """What the teacher held likely at each of the t tokens of its answer, the end-of-turn token among them.

    answer_ids    (t,) int64
    top_ids       (t, k) int64, likeliest first
    top_logprobs  (t, k) float32, normalised over the whole vocabulary: what is missing to 1 is the tail
    """

    answer_ids: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def shard_path(folder: Path, first_row: int) -> Path:
    """The shard of the block that begins at row `first_row`: a block that is done again replaces its own shard."""
    return folder / f"shard-{first_row:09d}.safetensors"


def write_shard(path: Path, row_ids: Sequence[str], targets: Sequence[TokenTargets], tokenizer: str) -> None:
    """Write one shard; it appears under its name only when it is complete. `tokenizer` says whose the ids are."""
    if not row_ids:
        return
    lengths = torch.tensor([0, *(len(target.answer_ids) for target in targets)])
    tensors = {
        "offsets": lengths.cumsum(0),
        "answer_ids": torch.cat([target.answer_ids for target in targets]).int(),
        "top_ids": torch.cat([target.top_ids for target in targets]).int(),
        "top_logprobs": torch.cat([target.top_logprobs for target in targets]).half(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        save_file(tensors, partial, metadata={"rows": json.dumps(list(row_ids)), "tokenizer": tokenizer})
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path.name}: cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


class TeacherLogits:
    """All shards of a folder, by row id. Only the ids are held in memory; a row's tensors are read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError where there is no shard, one cannot be read, or they are of different tokenizers."""
        self._places: dict[str, tuple[Path, int]] = {}
        tokenizers = set()
        for path in sorted(folder.glob(SHARD_PATTERN)):
            try:
                with safe_open(path, framework="pt") as file:
                    metadata = file.metadata()
                    rows = json.loads(metadata["rows"])
                    tokenizers.add(str(metadata["tokenizer"]))
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path.name}: not a shard of teacher logits: {error}") from None
            self._places |= {str(row): (path, index) for index, row in enumerate(rows)}
        if not self._places:
            raise DataError(f"{folder}: no teacher logits ({SHARD_PATTERN})")
        if len(tokenizers) > 1:
            raise DataError(f"{folder}: logits of different tokenizers: {', '.join(sorted(tokenizers))}")
        self.tokenizer = tokenizers.pop()

    def __contains__(self, row_id: str) -> bool:
        return row_id in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row_id: str) -> TokenTargets:
        """The targets of one row. Raises KeyError for a row without, DataError where its shard is damaged."""
        path, index = self._places[row_id]
        try:
            with safe_open(path, framework="pt") as file:
                start, end = file.get_slice("offsets")[index : index + 2].tolist()
                return TokenTargets(
                    file.get_slice("answer_ids")[start:end].long(),
                    file.get_slice("top_ids")[start:end].long(),
                    file.get_slice("top_logprobs")[start:end].float(),
                )
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(f"{path.name}: cannot be read: {error}") from None


def tokenizer_fingerprint(vocabulary: dict[str, int]) -> str:
    """The same for tokenizers that give the same ids to the same tokens."""
    pairs = sorted(vocabulary.items(), key=lambda pair: pair[1])
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]
