"""Golden vectors of a generator's graphs: a prompt for each prefill bucket, and what the generator as it is, in float32
and without graphs, goes on with: a few greedy tokens, with the logits that each was chosen from.

Graphs that do not repeat them are not those of these weights, or run on something that computes otherwise.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from core.accelerators.buckets import GOLDEN_TOKENS, Bucket, GeneratorBuckets, decode_name, prefill_name
from core.accelerators.generator_passes import GeneratorGraphs, GraphPasses
from core.decode_passes import TorchPasses
from core.errors import CheckpointError
from core.generator import Generator
from core.golden_check import TOLERANCE
from core.prompts import Prompt
from core.tensor_files import read_tensors


@torch.inference_mode()
def record_generator(generator: Generator, buckets: GeneratorBuckets) -> dict[str, Tensor]:
    """For each prefill bucket `<name>.ids` (n,), `.tokens` (A,) and `.logits` (A, V)."""
    golden: dict[str, Tensor] = {}
    for bucket in buckets.prefill:
        name, ids = prefill_name(bucket), _example_ids(generator, bucket)
        passes = TorchPasses(generator, 1, bucket.length)
        passes.reserve(1, bucket.length, idle=True)
        rows = [passes.prefill(0, [_as_prompt(ids)])]  # (1, V) each
        while len(rows) < GOLDEN_TOKENS:
            place = len(ids) + len(rows) - 1
            rows.append(passes.decode(rows[-1].argmax(-1), torch.tensor([place]), place + 1))
        logits = torch.cat(rows)
        golden |= {f"{name}.ids": ids, f"{name}.tokens": logits.argmax(-1), f"{name}.logits": logits}
    return golden


@torch.inference_mode()
def verify_generator(graphs: GeneratorGraphs, path: Path) -> dict[str, float]:
    """Run every prompt in every capacity that it fits; the largest error of each graph's logits.

    Raises CheckpointError for one over the tolerance, and for another token than the recorded one, unless the choice
    was too close for this type. Twice: TorchScript optimises a trace after its first run.
    """
    generator, buckets = graphs.generator, graphs.buckets
    errors: dict[str, float] = {}
    for bucket, ids, tokens, logits in _read(generator, buckets, path):
        for capacity in buckets.decode:
            if len(ids) + len(tokens) > capacity.length:
                continue
            for _ in range(2):
                for step, found in enumerate(_replay(graphs, bucket, capacity, ids, tokens)):
                    name = prefill_name(bucket) if step == 0 else decode_name(capacity)
                    error = _check(name, found, logits[step], TOLERANCE[generator.dtype])
                    errors[name] = max(error, errors.get(name, 0.0))
    return errors


def _replay(graphs: GeneratorGraphs, bucket: Bucket, capacity: Bucket, ids: Tensor, tokens: Tensor) -> Iterator[Tensor]:
    """Logits (V,) of the prompt in the last slot, and then after each of `tokens` but the last."""
    passes, slots = GraphPasses(graphs), capacity.rows
    passes.reserve(slots, capacity.length, idle=True)
    yield passes.read(slots - 1, _as_prompt(ids), bucket)[0]
    for place, token in enumerate(tokens[:-1], start=len(ids)):
        yield passes.decode(token.repeat(slots), torch.full((slots,), place), place + 1)[-1]


def _check(name: str, found: Tensor, expected: Tensor, limit: float) -> float:
    """Norm of the difference, relative to the norm. Raises CheckpointError."""
    found = found.float()
    error = float((found - expected).norm() / expected.norm())
    if not error <= limit:  # written so that NaN fails
        raise CheckpointError(
            f"graphs: {name} is off by {error:.2g} in its logits, over {limit}: it is not the graph of these weights, "
            "or this hardware computes something else"
        )
    first, second = expected.topk(2).values.tolist()
    if first - second > limit * expected.abs().max() and found.argmax() != expected.argmax():
        raise CheckpointError(f"graphs: {name} chooses another token than the recorded one")
    return error


def _read(
    generator: Generator, buckets: GeneratorBuckets, path: Path
) -> Iterator[tuple[Bucket, Tensor, Tensor, Tensor]]:
    """What `record_generator` wrote. Raises CheckpointError for a tensor that is missing, or does not fit."""
    vocabulary = generator.model.config.vocab_size
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for bucket in buckets.prefill:
        name = prefill_name(bucket)
        expected[f"{name}.ids"] = (tuple(_example_ids(generator, bucket).shape), torch.int64)
        expected[f"{name}.tokens"] = ((GOLDEN_TOKENS,), torch.int64)
        expected[f"{name}.logits"] = ((GOLDEN_TOKENS, vocabulary), torch.float32)
    dtypes = {name: dtype for name, (_, dtype) in expected.items()}
    found = dict(read_tensors(path, {name: shape for name, (shape, _) in expected.items()}, dtypes))
    for bucket in buckets.prefill:
        ids, tokens, logits = (found[f"{prefill_name(bucket)}.{part}"] for part in ("ids", "tokens", "logits"))
        read = torch.cat([ids, tokens])
        if read.min() < 0 or read.max() >= vocabulary or not torch.equal(logits.argmax(-1), tokens):
            raise CheckpointError(f"{path.name}: the tokens of {prefill_name(bucket)} are not those of its logits")
        yield bucket, ids, tokens, logits


def _as_prompt(ids: Tensor) -> Prompt:
    return Prompt(ids, torch.zeros(len(ids), dtype=torch.bool), torch.zeros(0, 0, dtype=torch.float32))


def _example_ids(generator: Generator, bucket: Bucket) -> Tensor:
    """A prompt (n,) that leaves a quarter of the bucket for padding."""
    usable = min(500, generator.model.config.vocab_size - 2)
    place = torch.arange(bucket.length - bucket.length // 4)
    ids: Tensor = 2 + (7919 * place + 104729 * bucket.length) % usable
    return ids
