"""A generator's compiled graphs, and a running batch on them: `core.decode_passes`, in fixed shapes. Knows no files.

Keys and values are kept here, on the host, and go through the decode graph whole at every token. On an accelerator
with memory of its own that is a copy there and back for each token.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from core.accelerators.base import Accelerator, Compiled, CompileSpec, Tensors
from core.accelerators.buckets import (
    Bucket,
    GeneratorBuckets,
    check_generator_buckets,
    choose_bucket,
    decode_name,
    prefill_name,
)
from core.accelerators.generator_graph import (
    DecodeGraph,
    PrefillGraph,
    decode_example,
    empty_cache,
    prefill_example,
)
from core.generator import Generator
from core.prompts import Prompt


class GeneratorGraphs:
    """The compiled graphs of one generator, by name; any number of batches may run on them, one at a time.

    runs  how often each was run
    """

    def __init__(self, generator: Generator, buckets: GeneratorBuckets, graphs: Mapping[str, Compiled]) -> None:
        self.generator = generator
        self.buckets = buckets
        self._graphs = dict(graphs)
        self.runs: dict[str, int] = dict.fromkeys(buckets.names, 0)

    def run(self, name: str, *inputs: Tensor) -> Tensors:
        """One pass of the graph `name` over inputs in its shapes."""
        self.runs[name] += 1
        return self._graphs[name](*inputs)

    def passes(self) -> "GraphPasses":
        """An empty batch's passes, with keys and values of their own."""
        return GraphPasses(self)

    def replace_weights(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of another `GeneratorGraph` of the same shapes; nothing is compiled again."""
        for graph in self._graphs.values():
            graph.replace_weights(state)


class GraphPasses:
    """A `DecodePasses` on graphs: as many rows and positions as they were made for."""

    def __init__(self, graphs: GeneratorGraphs) -> None:
        self._graphs = graphs
        self._generator = graphs.generator
        self.max_sequences, self.max_tokens = graphs.buckets.slots, graphs.buckets.capacity
        self._bucket: Bucket | None = None  # of the decode graph in use
        self._cache: list[Tensor] = []  # (slots, kv_heads, capacity, head_dim), keys and values of each layer in turn

    @property
    def bytes(self) -> int:
        """Memory of keys and values now."""
        return sum(tensor.nbytes for tensor in self._cache)

    def reserve(self, rows: int, tokens: int, *, idle: bool) -> None:
        """Take the shortest capacity that is long enough; what rows hold comes along."""
        bucket = choose_bucket(self._graphs.buckets.decode, rows, tokens)
        if self._bucket is None or (idle and bucket != self._bucket):
            self._cache = empty_cache(self._generator, bucket)
        elif bucket.length > self._bucket.length:
            longer = (0, 0, 0, bucket.length - self._bucket.length)
            self._cache = [functional.pad(tensor, longer) for tensor in self._cache]
        else:
            return
        self._bucket = bucket

    def prefill(self, first: int, prompts: Sequence[Prompt]) -> Tensor:
        """One pass for each prompt, in the shortest graph that holds it; next logits `(B, V)`."""
        buckets = self._graphs.buckets.prefill
        logits = [
            self.read(row, prompt, choose_bucket(buckets, 1, prompt.tokens))
            for row, prompt in enumerate(prompts, start=first)
        ]
        return torch.cat(logits)

    def read(self, row: int, prompt: Prompt, bucket: Bucket) -> Tensor:
        """Read one prompt into `row` by the graph of `bucket`; its next logits `(1, V)`."""
        spliced = self._generator.splice(prompt.ids[None], prompt.memory_mask[None], prompt.memory)  # (1, n, d)
        padded = functional.pad(spliced, (0, 0, 0, bucket.length - prompt.tokens))  # (1, T, d)
        last = torch.tensor([prompt.tokens - 1])
        logits, *tensors = self._graphs.run(prefill_name(bucket), padded, last)
        for held, new in zip(self._cache, tensors, strict=True):
            held[row, :, : prompt.tokens] = new[0, :, : prompt.tokens]  # (kv_heads, n, head_dim)
        return logits

    def decode(self, tokens: Tensor, positions: Tensor, width: int) -> Tensor:
        """One pass over all slots; next logits `(n, V)` of the first n, which have `tokens` `(n,)` at `positions`."""
        bucket = self._bucket
        assert bucket is not None  # rows are reserved before they decode
        free = bucket.rows - len(tokens)
        embeddings = functional.pad(self._generator.embed(tokens[:, None]), (0, 0, 0, 0, 0, free))  # (S, 1, d)
        # A slot that writes nothing may hold a prompt. Its last position is the one place that it cannot have filled,
        # and whatever stands there is replaced before it is ever seen.
        at = functional.pad(positions, (0, free), value=bucket.length - 1)  # (S,)
        logits, *self._cache = self._graphs.run(decode_name(bucket), embeddings, at, *self._cache)
        return logits[: len(tokens)]

    def move(self, source: int, target: int, length: int) -> None:
        """As the protocol has it."""
        for tensor in self._cache:
            tensor[target, :, :length] = tensor[source, :, :length]

    def forget(self, row: int) -> None:
        """As the protocol has it."""
        for tensor in self._cache:
            tensor[row] = 0


def compile_generator(
    generator: Generator, accelerator: Accelerator, buckets: GeneratorBuckets, spec: CompileSpec | None = None
) -> GeneratorGraphs:
    """Compile all graphs. Raises ConfigError."""
    graphs = dict(compile_graphs(generator, accelerator, buckets, spec or CompileSpec()))
    return GeneratorGraphs(generator, buckets, graphs)


def compile_graphs(
    generator: Generator, accelerator: Accelerator, buckets: GeneratorBuckets, spec: CompileSpec
) -> Iterator[tuple[str, Compiled]]:
    """Each graph with its name, compiled when it is asked for. Raises ConfigError."""
    check_generator_buckets(buckets, generator.max_tokens)
    prefill, decode = PrefillGraph(generator), DecodeGraph(generator)
    for bucket in buckets.prefill:
        yield prefill_name(bucket), accelerator.compile(prefill, prefill_example(generator, bucket), spec)
    for bucket in buckets.decode:
        yield decode_name(bucket), accelerator.compile(decode, decode_example(generator, bucket), spec)
