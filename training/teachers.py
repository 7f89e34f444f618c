"""Teachers: whoever answers a row's query from its passages as text. Knows no files.

Greedy throughout, as in the paper (OSCAR sec. 4: the teacher reads the passages as text, at most 128 new tokens).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import httpx
import torch

from core.config import PromptConfig
from core.decoding import generate
from core.generator import Generator
from core.prompts import Block, Prompt, PromptTemplate
from core.sampling import GenerationOptions
from core.tokenization import encode
from training.chat_endpoint import ChatEndpoint, Message, complete_chats
from training.data_format import Row
from training.teacher_logits import TokenTargets


@dataclass(frozen=True, slots=True)
class TeacherAnswer:
    """What the teacher said; empty where it said nothing or could not read the row."""

    text: str
    targets: TokenTargets | None = None


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
        """One answer a row; empty for a row whose prompt leaves no room for an answer in the model's positions."""
        prompts = [self._prompt(row) for row in rows]
        room = self._generator.max_tokens - self._options.max_new_tokens
        fitting = [index for index, prompt in enumerate(prompts) if prompt.tokens <= room]
        options = [self._options] * len(fitting)
        chosen = [prompts[index] for index in fitting]
        completions = generate(self._generator, chosen, options, max_sequences=len(chosen)) if chosen else []
        answers = [TeacherAnswer("")] * len(rows)
        for index, completion in zip(fitting, completions, strict=True):
            text = completion.text.strip()
            wanted = self._top_k > 0 and bool(text)
            answers[index] = TeacherAnswer(text, self._targets(prompts[index], text) if wanted else None)
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
    """A model behind an OpenAI-compatible endpoint, which sees the words of the generator's prompt."""

    def __init__(
        self,
        endpoint: ChatEndpoint,
        prompt: PromptConfig,
        max_new_tokens: int = 128,
        *,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._endpoint = endpoint
        self._system = prompt.system
        self._max_new_tokens = max_new_tokens
        self._transport = transport
        self._sleep = sleep

    def answer(self, rows: Sequence[Row]) -> list[TeacherAnswer]:
        """One answer a row. Raises EndpointError."""
        chats = [self._chat(row) for row in rows]
        replies = complete_chats(
            self._endpoint, chats, self._max_new_tokens, transport=self._transport, sleep=self._sleep
        )
        return [TeacherAnswer(reply.strip()) for reply in replies]

    def _chat(self, row: Row) -> list[Message]:
        passages = "".join(f"\n[{number}] {passage.content}" for number, passage in enumerate(row.passages, start=1))
        user = f"Background:{passages}\nQuestion: {row.query}"
        return [{"role": "system", "content": self._system}, {"role": "user", "content": user}]
