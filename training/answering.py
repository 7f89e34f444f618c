"""Answer a batch of questions in one setting, stage by stage, and score the answers. Knows no files.

A stage is whatever context manager the caller gives for its name: a stopwatch here, a FLOP counter in `costs.py`.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from core.compressed import CompressedPassage
from core.decoding import DecodeBatch
from core.model import Model
from core.pipeline import PreparedRequest, build_prompt, compress, prepare, text_prompt
from core.planning import choose_modes, plan_request
from core.policy import Policy
from core.prompts import Prompt
from core.sampling import GenerationOptions
from training.metrics import best_over_references, exact_match, rouge_l, substring_accuracy, survival, token_f1
from training.questions import Question
from training.results import AnswerRecord, RankingRecord, Setting, compressor_name

Stage = Callable[[str], AbstractContextManager[object]]
Compressed = list[list[CompressedPassage]]


@dataclass(frozen=True, slots=True)
class Generated:
    """An answer with the positions that were read for it and the tokens that were written."""

    text: str
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Stopwatch:
    """Seconds by stage; waits for the device before it reads the clock."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self.seconds[name] += self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def needs_compression(model: Model, setting: Setting) -> bool:
    """Text mode compresses only where the passages are put in order of relevance."""
    return setting.mode != "text" or model.config.prompt.passage_order == "relevance"


def prepare_batch(model: Model, questions: Sequence[Question], stage: Stage) -> list[PreparedRequest]:
    """Tokenise and chunk every question."""
    with stage("prepare"):
        return [prepare(model, question.query, question.passages) for question in questions]


def compress_batch(
    model: Model, requests: Sequence[PreparedRequest], rate: int | None, stage: Stage, hops: int = 1
) -> Compressed:
    """Compress all questions' chunks together."""
    with stage("compress"):
        return compress(model, requests, rate, hops=hops)


def generate_batch(
    model: Model,
    requests: Sequence[PreparedRequest],
    compressed: Compressed | None,
    setting: Setting,
    options: GenerationOptions,
    stage: Stage,
) -> list[Generated]:
    """Build every prompt and decode them side by side; `compressed` is None where nothing needed compressing."""
    policy = Policy(setting.mode, max_prompt_tokens=setting.budget, hops=setting.hops)
    if compressed is not None and setting.budget is not None:
        with stage("compress"):
            compressed = [
                _as_planned(model, request, passages, policy, options)
                for request, passages in zip(requests, compressed, strict=True)
            ]
    with stage("prompt"):
        if compressed is None:
            prompts = [text_prompt(model, request) for request in requests]
        else:
            prompts = [
                _prompt(model, request, passages, policy, options)
                for request, passages in zip(requests, compressed, strict=True)
            ]
    room = max(prompt.tokens for prompt in prompts) + options.max_new_tokens
    batch = DecodeBatch(model.generator, len(prompts), room)
    with stage("prefill"):
        texts = dict.fromkeys(batch.add(prompts, [options] * len(prompts)), "")
    with stage("decode"):
        while batch.live:
            for event in batch.step():
                texts[event.sequence] += event.text
    return [Generated(text, sequence.prompt_tokens, len(sequence.token_ids)) for sequence, text in texts.items()]


def _as_planned(
    model: Model,
    request: PreparedRequest,
    passages: list[CompressedPassage],
    policy: Policy,
    options: GenerationOptions,
) -> list[CompressedPassage]:
    """What `auto` would have of passages that were all compressed at the default rate.

    Compressing counts as free, so that nothing depends on what it costs on this machine.
    """
    plan = plan_request(dataclasses.replace(model, costs=None), request, policy, None, options.max_new_tokens)
    if plan.rate != model.config.compressor.rates[0]:
        return compress(model, [request], plan.rate, read=[plan.read], hops=policy.hops)[0]
    return [each if each.index in plan.read else CompressedPassage(each.index, (), None) for each in passages]


def _prompt(
    model: Model,
    request: PreparedRequest,
    passages: list[CompressedPassage],
    policy: Policy,
    options: GenerationOptions,
) -> Prompt:
    choices = choose_modes(model, request, passages, policy, options.max_new_tokens)
    return build_prompt(model, request, passages, [choice.mode for choice in choices])


def answer_batch(
    model: Model, questions: Sequence[Question], settings: Sequence[Setting], options: GenerationOptions
) -> tuple[list[AnswerRecord], list[RankingRecord]]:
    """Answer every question in every setting; the settings differ in mode only, so they share what is compressed."""
    if len({(setting.rate, setting.passages, setting.hops) for setting in settings}) != 1:
        raise ValueError("settings of one batch share their rate, their number of passages and their hops")
    cut = [question.with_passages(settings[0].passages) for question in questions]
    shared = Stopwatch(model.device)
    requests = prepare_batch(model, cut, shared.stage)
    compressed = None
    if any(needs_compression(model, setting) for setting in settings):
        compressed = compress_batch(model, requests, settings[0].rate, shared.stage, settings[0].hops)
    answers = []
    for setting in settings:
        watch = Stopwatch(model.device, defaultdict(float, shared.seconds))
        generated = generate_batch(model, requests, compressed, setting, options, watch.stage)
        seconds = {name: value / len(cut) for name, value in watch.seconds.items()}
        answers += [
            score_answer(question, setting, answer, seconds) for question, answer in zip(cut, generated, strict=True)
        ]
    first = settings[0]
    if compressed is None or first.rate is None:
        return answers, []
    return answers, rank_compressed(cut, compressed, first.rate, first.passages, first.hops)


def score_answer(question: Question, setting: Setting, generated: Generated, seconds: dict[str, float]) -> AnswerRecord:
    """All answer metrics of one answer."""
    text, references = generated.text, question.references
    return AnswerRecord(
        question=question.id,
        setting=setting,
        answer=text,
        em=best_over_references(exact_match, text, references),
        f1=best_over_references(token_f1, text, references),
        substring=best_over_references(substring_accuracy, text, references),
        rouge_l=best_over_references(rouge_l, text, references),
        survival=survival(text, references, [passage.content for passage in question.passages]),
        prompt_tokens=generated.prompt_tokens,
        completion_tokens=generated.completion_tokens,
        seconds=seconds,
    )


def rank_compressed(
    questions: Sequence[Question], compressed: Compressed, rate: int, passages: int, hops: int = 1
) -> list[RankingRecord]:
    """The compressor's raw relevance score of every passage: the best of its chunks."""
    return [
        RankingRecord(
            question.id,
            compressor_name(rate, hops),
            passages,
            list(question.gold),
            [max(chunk.score for chunk in passage.chunks) for passage in passages_of],
        )
        for question, passages_of in zip(questions, compressed, strict=True)
    ]
