"""Teachers: whoever answers a row's query from its passages as text. Knows no files.

Greedy throughout, as in the paper (OSCAR sec. 4: the teacher reads the passages as text, at most 128 new tokens).
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import httpx
import torch

from core.config import PromptConfig
from core.decoding import generate
from core.generator import Generator
from core.prompts import Block, Prompt, PromptTemplate
from core.sampling import GenerationOptions
from core.tokenization import encode
from training.chat_endpoint import ChatEndpoint, EndpointError, Message, complete_chats
from training.data_format import Row
from training.teacher_logits import TokenTargets

log = logging.getLogger(__name__)

SILENT = "the teacher said nothing"
THINKING = "the teacher did not end its <think>"
CUT = "the teacher's answer was cut at --max-new-tokens"
NO_ROOM = "the prompt leaves no room for an answer"
REFUSED = "the endpoint refused the prompt"


@dataclass(frozen=True, slots=True)
class TeacherAnswer:
    """What the teacher said; empty where there is nothing to learn from, and `missing` is why."""

    text: str
    targets: TokenTargets | None = None
    missing: str = ""


def whole_answer(text: str, *, cut: bool) -> TeacherAnswer:
    """`text` as an answer; none where it was cut: to learn it would be to learn to stop in mid-sentence.

    What a model thinks, up to the last `</think>`, is no part of its answer; some servers leave out the first tag.
    """
    if cut:
        return TeacherAnswer("", missing=CUT)
    said = text.rpartition("</think>")[2].strip()
    if "<think>" in said:
        return TeacherAnswer("", missing=THINKING)
    return TeacherAnswer(said, missing="" if said else SILENT)


class Teacher(Protocol):
    """Answers rows; the answer to a row does not depend on the others."""

    def answer(self, rows: Sequence[Row]) -> list[TeacherAnswer]:
        """One answer a row, in order."""
        ...


class LocalTeacher:
    """A causal language model on this machine.

    top_k   how many log-probabilities are kept at each token of an answer; 0: none
    """

    def __init__(self, generator: Generator, prompt: PromptConfig, max_new_tokens: int = 128, top_k: int = 0) -> None:
        self._generator = generator
        self._template = PromptTemplate(generator.tokenizer, prompt)
        self._options = GenerationOptions(max_new_tokens=max_new_tokens)
        self._top_k = top_k

    def answer(self, rows: Sequence[Row]) -> list[TeacherAnswer]:
        """One answer a row; empty where the answer is not whole, or the model has no positions left for it."""
        prompts = [self._prompt(row) for row in rows]
        room = self._generator.max_tokens - self._options.max_new_tokens
        fitting = [index for index, prompt in enumerate(prompts) if prompt.tokens <= room]
        options = [self._options] * len(fitting)
        chosen = [prompts[index] for index in fitting]
        completions = generate(self._generator, chosen, options, max_sequences=len(chosen)) if chosen else []
        answers = [TeacherAnswer("", missing=NO_ROOM)] * len(rows)
        for index, completion in zip(fitting, completions, strict=True):
            answer = whole_answer(completion.text, cut=completion.finish_reason == "length")
            if self._top_k > 0 and answer.text:
                answer = replace(answer, targets=self._targets(prompts[index], answer.text))
            answers[index] = answer
        return answers

    def _prompt(self, row: Row) -> Prompt:
        blocks = [Block(text_ids=encode(self._generator.tokenizer, passage.content).ids) for passage in row.passages]
        return self._template.build(row.query, blocks)

    @torch.inference_mode()
    def _targets(self, prompt: Prompt, text: str) -> TokenTargets:
        """Top-k log-probabilities at the answer's tokens, in one pass over prompt and answer.

        The answer is tokenised again as training will tokenise it: the tokens are those of its loss.
        """
        answer = torch.tensor(self._template.answer_ids(text))  # (t,)
        ids = torch.cat([prompt.ids, answer[:-1]]).to(self._generator.device)  # (T + t - 1,)
        positions = torch.arange(len(ids), device=ids.device).unsqueeze(0)
        embeddings = self._generator.embed(ids).unsqueeze(0)  # (1, T + t - 1, d)
        hidden = self._generator.hidden_states(embeddings, mask=None, positions=positions, cache=None)
        logits = self._generator.next_logits(hidden[0, prompt.tokens - 1 :])  # (t, V)
        top = logits.float().log_softmax(-1).topk(min(self._top_k, logits.shape[-1]))
        return TokenTargets(answer, top.indices.cpu(), top.values.cpu())


class EndpointTeacher:
    """A model behind an OpenAI-compatible endpoint, which sees the words of the generator's prompt.

    proven   it has answered before; else it is in error where it refuses all of the first rows
    """

    def __init__(
        self,
        endpoint: ChatEndpoint,
        prompt: PromptConfig,
        max_new_tokens: int = 128,
        *,
        proven: bool = False,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._endpoint = endpoint
        self._system = prompt.system
        self._max_new_tokens = max_new_tokens
        self._proven = proven
        self._transport = transport
        self._sleep = sleep

    def answer(self, rows: Sequence[Row]) -> list[TeacherAnswer]:
        """One answer a row; empty where it is not whole or the row is refused. Raises EndpointError."""
        chats = [self._chat(row) for row in rows]
        replies = complete_chats(
            self._endpoint,
            chats,
            self._max_new_tokens,
            may_refuse=True,
            transport=self._transport,
            sleep=self._sleep,
        )
        refused = {row.id: reply.refusal for row, reply in zip(rows, replies, strict=True) if reply.refusal}
        if refused and len(refused) == len(rows) and not self._proven:
            raise EndpointError(f"each of the first {len(rows)} rows is refused; {refused[rows[0].id]}")
        self._proven = True
        for row_id, refusal in refused.items():
            log.warning("row %r: %s", row_id, refusal)
        return [
            TeacherAnswer("", missing=REFUSED) if reply.refusal else whole_answer(reply.text, cut=reply.cut)
            for reply in replies
        ]

    def _chat(self, row: Row) -> list[Message]:
        passages = "".join(f"\n[{number}] {passage.content}" for number, passage in enumerate(row.passages, start=1))
        user = f"Background:{passages}\nQuestion: {row.query}"
        return [{"role": "system", "content": self._system}, {"role": "user", "content": user}]
