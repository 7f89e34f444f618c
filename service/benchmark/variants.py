"""The ways to answer that are compared, each run stage by stage over one group of questions.

Every variant reads the same questions and writes the same number of tokens for each, so a group's cost depends on the
way alone. A further engine is one more entry in `VARIANTS`: a function that enters its stages. Knows no clocks.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from core.config import Mode
from core.costs import Stages
from core.decoding import DecodeBatch
from core.errors import TooLargeError
from core.model import Model
from core.pipeline import build_prompt, compress, prepare, text_prompt
from core.planning import choose_modes
from core.policy import Policy
from core.prompts import Content, Prompt
from core.sampling import GenerationOptions
from core.tokenization import encode
from service.benchmark.questions import Question

STAGES = ("prepare", "compress", "prompt", "prefill", "decode")  # the first token is there when `decode` begins


@dataclass(frozen=True, slots=True)
class Work:
    """What a run did, to be sure that variants are comparable: per question, tokens read and tokens written."""

    prompt_tokens: list[int]
    written: list[list[int]]


Variant = Callable[[Model, Sequence[Question], int, Stages], Work]


def without_end(model: Model) -> Model:
    """`model`, sharing its weights, with a generator that never ends an answer before its limit.

    Both engines' end-of-turn tokens become plain tokens, so that each answer has exactly as many as are asked for.
    """
    generator = copy.copy(model.generator)
    generator.eos_ids = frozenset()
    return replace(model, generator=generator)


@torch.inference_mode()
def run_transformers(model: Model, questions: Sequence[Question], new_tokens: int, stages: Stages) -> Work:
    """Plain `generate` of transformers over the text prompts, left-padded, as one batch."""
    stages.enter("prepare")
    tokenizer, device = model.generator.tokenizer, model.generator.device
    layouts = [
        model.template.layout(
            q.query, [Content(text_ids=encode(tokenizer, passage.content).ids) for passage in q.passages]
        )
        for q in questions
    ]
    stages.enter("prompt")
    ids = [layout.ids for layout in layouts]
    batch = pad_sequence(ids, batch_first=True, padding_side="left").to(device)  # (B, T)
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True, padding_side="left").to(device)
    require_room(model, max(len(each) for each in ids), new_tokens)
    stages.enter("prefill")
    network: Any = model.generator.model  # its `generate` is not typed
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    own, network.generation_config = network.generation_config, settings  # else its end-of-turn tokens are merged in
    try:
        output = network.generate(
            batch, attention_mask=mask, stopping_criteria=StoppingCriteriaList([_EnterDecode(stages)])
        )
    finally:
        network.generation_config = own
    stages.end()
    return Work([len(each) for each in ids], output[:, batch.shape[1] :].tolist())


class _EnterDecode(StoppingCriteria):
    """Asked after every token: the first time, decoding begins. Never stops anything."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        self._stages.enter("decode")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def run_engine(model: Model, questions: Sequence[Question], new_tokens: int, stages: Stages, *, mode: Mode) -> Work:
    """Our engine. In `text` mode the compressor does not run, since nothing needs it."""
    prompts = build_prompts(model, questions, stages, mode)
    stages.enter("prefill")
    sequences = write_answers(model, prompts, new_tokens, stages)
    stages.end()
    return Work([prompt.tokens for prompt in prompts], sequences)


def build_prompts(model: Model, questions: Sequence[Question], stages: Stages, mode: Mode) -> list[Prompt]:
    """The prompts of all questions; enters every stage before the prefill."""
    stages.enter("prepare")
    requests = [prepare(model, question.query, question.passages) for question in questions]
    if mode == "text":
        stages.enter("prompt")
        return [text_prompt(model, request) for request in requests]
    stages.enter("compress")
    compressed = compress(model, requests)
    stages.enter("prompt")
    return [
        build_prompt(model, request, passages, [c.mode for c in choose_modes(model, request, passages, Policy(mode))])
        for request, passages in zip(requests, compressed, strict=True)
    ]


def write_answers(model: Model, prompts: Sequence[Prompt], new_tokens: int, stages: Stages) -> list[list[int]]:
    """Prefill all prompts as one batch, then decode it; enters `decode` once the first tokens are there."""
    longest = max(prompt.tokens for prompt in prompts)
    require_room(model, longest, new_tokens)
    batch = DecodeBatch(model.generator, len(prompts), longest + new_tokens)
    sequences = batch.add(prompts, [GenerationOptions(max_new_tokens=new_tokens)] * len(prompts))
    batch.step()  # chooses from the prefill's logits: no forward pass yet
    stages.enter("decode")
    while batch.live:
        batch.step()
    return [sequence.token_ids for sequence in sequences]


def require_room(model: Model, prompt_tokens: int, new_tokens: int) -> None:
    """Raises TooLargeError where not all answers could have their full length."""
    limit = model.generator.max_tokens
    if prompt_tokens + new_tokens > limit:
        raise TooLargeError("passages", f"{prompt_tokens} and {new_tokens} new tokens are over {limit}", limit)


VARIANTS: Mapping[str, Variant] = {
    "transformers": run_transformers,
    "text": partial(run_engine, mode="text"),
    "compressed": partial(run_engine, mode="compressed"),
    "hybrid": partial(run_engine, mode="hybrid"),
}
