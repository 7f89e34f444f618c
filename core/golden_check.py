"""Runs the golden example: to record it when a checkpoint is saved, and to compare when one is loaded.

A loaded model that does not repeat it is not the model that was saved. Knows no folders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.decoding import generate
from core.errors import CheckpointError, InputError
from core.golden import ANSWER_TOKENS, PASSAGES, PASSAGES_USED, QUERY, Golden, GoldenExample
from core.model import Model
from core.passages import Passage
from core.pipeline import compress, prepare, rows_of
from core.prompts import Block, Prompt
from core.readouts import PointerReadout
from core.rows import collate_rows
from core.sampling import GenerationOptions

GREEDY = GenerationOptions(max_new_tokens=ANSWER_TOKENS)
# Largest difference from the recorded outputs that a load accepts. Measured on a CPU: 0 in float32 with another number
# of threads; bfloat16 0.002 to 0.05 with SmolLM2-135M, 0.036 with the demo checkpoint; float16 0.006. Noise of a tenth
# of the compressor's weights is 0.16 off, a fiftieth 0.05. A GPU that multiplies in TF32 keeps 10 bits of 23.
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True, slots=True)
class GoldenCheck:
    """How a model repeated the golden example.

    exact    every output is bit-identical, and the answer is the same
    errors   difference of each output, relative to its size
    """

    exact: bool
    errors: dict[str, float]


def record_golden(model: Model) -> Golden:
    """Run the golden example through `model`. Raises CheckpointError where an output is not finite."""
    rate = model.config.compressor.rates[0]
    passages = _surest_passages(model, rate)
    memory, scores, prompt = _compress(model, QUERY, passages, rate)
    completion = generate(model.generator, [prompt], [GREEDY])[0]
    example = GoldenExample(
        passages=passages,
        rate=rate,
        memory_tokens=len(memory),
        chunks=len(scores),
        answer=completion.text,
        answer_ids=tuple(completion.token_ids),
    )
    golden = Golden(example, memory, scores, _logprobs(model, prompt, example.answer_ids))
    for name, value in golden.outputs.items():
        if not value.isfinite().all():
            raise CheckpointError(f"golden example: {name} is not finite, so the weights are no good")
    return golden


def verify_golden(model: Model, golden: Golden, tolerance: float | None = None) -> GoldenCheck:
    """Run the example again and compare, within `tolerance`, or else that of the model's dtype.

    The answer is compared token by token where the model runs in float32 on the CPU and no tolerance is given; else
    rounding may tip a close choice, and the log-probabilities of the recorded answer stand for it.

    Raises CheckpointError that says which output is off, and by how much.
    """
    example = golden.example
    if max(example.answer_ids) >= model.generator.model.config.vocab_size:
        raise CheckpointError("golden.json: answer_ids holds a token that the generator does not have")
    try:
        memory, scores, prompt = _compress(model, example.query, example.passages, example.rate)
        room = model.generator.max_tokens - len(example.answer_ids)
        if prompt.tokens > room:  # before one pass over all of it
            raise CheckpointError(f"golden.json: the prompt has {prompt.tokens} tokens; at most {room} fit")
        answer_ids = tuple(generate(model.generator, [prompt], [GREEDY])[0].token_ids)
        again = Golden(example, memory, scores, _logprobs(model, prompt, example.answer_ids))
    except InputError as error:
        raise CheckpointError(f"golden.json: {error.message}") from None
    except IndexError:  # of a table of embeddings
        raise CheckpointError("golden example: a tokenizer gives tokens that its model does not have") from None
    dtype = model.generator.dtype
    errors = _compare(again.outputs, golden.outputs, TOLERANCE[dtype] if tolerance is None else tolerance)
    same = answer_ids == example.answer_ids
    if not same and tolerance is None and dtype == torch.float32 and model.device.type == "cpu":
        raise CheckpointError("golden example: the answer is not the recorded one")
    identical = all(torch.equal(again.outputs[name], value) for name, value in golden.outputs.items())
    return GoldenCheck(exact=same and identical, errors=errors)


def golden_prompt(model: Model, example: GoldenExample) -> Prompt:
    """The example's prompt in `compressed` mode, as `model` makes it. Raises InputError."""
    return _compress(model, example.query, example.passages, example.rate)[2]


@torch.inference_mode()
def _surest_passages(model: Model, rate: int) -> tuple[str, ...]:
    """The passages of the example: of a pointer's, those of which the likeliest place is furthest from the next.

    A pointer picks one place, so where two are nearly as good, rounding in another number format picks the other.
    """
    if not isinstance(model.compressor.readout, PointerReadout):
        return PASSAGES[:PASSAGES_USED]
    gaps = []
    for text in PASSAGES:
        rows = rows_of(model, prepare(model, QUERY, [Passage(text)]), rate)
        batch = collate_rows(rows, model.compressor.row_format, model.config.compressor.max_memory_tokens)
        logits = model.compressor(batch.to(model.device), model.generator.embed).logits
        assert logits is not None  # a pointer's
        likeliest = logits.topk(2, dim=-1).values  # (1, W, 2)
        gaps.append(float((likeliest[..., 0] - likeliest[..., 1]).min()))
    surest = sorted(range(len(PASSAGES)), key=lambda index: -gaps[index])[:PASSAGES_USED]
    return tuple(PASSAGES[index] for index in sorted(surest))


@torch.inference_mode()
def _compress(model: Model, query: str, texts: Sequence[str], rate: int) -> tuple[Tensor, Tensor, Prompt]:
    """Memory embeddings (M, d) and scores (chunks,) in float32 on the CPU, and the prompt in `compressed` mode."""
    request = prepare(model, query, [Passage(text) for text in texts])
    passages = compress(model, [request], rate)[0]
    # In the order given, whatever the config says: two scores that are close must not decide the comparison.
    prompt = model.template.build(query, [Block(memory=passage.memory) for passage in passages])
    memory = torch.cat([passage.memory for passage in passages])  # (M, d)
    scores = torch.tensor([chunk.score for passage in passages for chunk in passage.chunks], dtype=torch.float32)
    return memory.float().cpu(), scores, prompt


@torch.inference_mode()
def _logprobs(model: Model, prompt: Prompt, answer_ids: tuple[int, ...]) -> Tensor:
    """Log-probabilities (A,) of the answer's tokens, each given what stands before it."""
    answer = torch.tensor(answer_ids)
    ids = torch.cat([prompt.ids, answer]).unsqueeze(0).to(model.device)  # (1, T + A)
    mask = torch.cat([prompt.memory_mask, torch.zeros(len(answer), dtype=torch.bool)]).unsqueeze(0).to(model.device)
    inputs = model.generator.splice(ids, mask, prompt.memory)  # (1, T + A, d)
    decoder = model.generator.model.get_decoder()
    hidden = decoder(inputs_embeds=inputs, use_cache=False).last_hidden_state  # (1, T + A, d)
    logits = model.generator.next_logits(hidden[0, len(prompt.ids) - 1 : -1])
    logprobs: Tensor = logits.float().log_softmax(-1).cpu()  # (A, V)
    return logprobs.gather(1, answer.unsqueeze(1)).squeeze(1)


def _compare(outputs: Mapping[str, Tensor], recorded: Mapping[str, Tensor], tolerance: float) -> dict[str, float]:
    """The error of each output. Raises CheckpointError for one over the tolerance or of another shape."""
    errors = {}
    for name, expected in recorded.items():
        value = outputs[name]
        if value.shape != expected.shape:
            raise CheckpointError(
                f"golden example: {name} has shape {tuple(value.shape)}, not {tuple(expected.shape)}: "
                "the tokenizer or the config is not the one it was recorded with"
            )
        errors[name] = _memory_error(value, expected) if name == "memory" else _value_error(value, expected)
        if not errors[name] <= tolerance:  # written so that NaN fails
            raise CheckpointError(f"golden example: {name} is off by {errors[name]:.2g}, over {tolerance}")
    return errors


def _memory_error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm (Frobenius)."""
    return float((value - expected).norm() / expected.norm().clamp(min=1e-12))


def _value_error(value: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to 1 + the largest value: scores and log-probabilities may all be near 0."""
    return float((value - expected).abs().max() / (1 + expected.abs().max()))
