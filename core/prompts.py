"""The generator's prompt: its own chat template around instruction, passages and question. Knows no weights.

Each passage stands in the prompt as memory embeddings, as text, or as the one and then the other. The chat template is
rendered once with sentinels, and every part is tokenised apart, so a passage's tokens are the same wherever it stands,
and control tokens that a caller spells out in a passage or a question stay plain text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from core.base_models import first_line
from core.config import PromptConfig
from core.errors import BaseModelError
from core.tokenization import encode, keep_apart, leading_special_ids

SYSTEM, USER, ASSISTANT = "\ue000system\ue001", "\ue000user\ue001", "\ue000assistant\ue001"
MEMORY_ID = 0  # stands at memory positions: its embedding is overwritten, so any id of the vocabulary would do
# Templates that print today's date (Llama 3) or think aloud (Qwen 3) are held to one short, reproducible form.
TEMPLATE_OPTIONS: dict[str, Any] = {"date_string": "26 Jul 2024", "enable_thinking": False}


class Content(NamedTuple):
    """What one passage takes of a prompt: so many memory embeddings, then its text in generator token ids."""

    memory_tokens: int = 0
    text_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """One passage of the prompt: memory embeddings `(l, d)`, generator token ids, or the embeddings before the ids."""

    memory: Tensor | None = None
    text_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.memory is None and not self.text_ids:
            raise ValueError("a block holds memory, text_ids or both")
        if self.memory is not None and self.memory.ndim != 2:
            raise ValueError(f"memory must be (l, d), not {tuple(self.memory.shape)}")

    @property
    def content(self) -> Content:
        """How much this is, without the embeddings themselves."""
        return Content(0 if self.memory is None else self.memory.shape[0], self.text_ids)


@dataclass(frozen=True, slots=True)
class Layout:
    """A prompt before its memory embeddings are known.

    ids          (T,) int64; MEMORY_ID where an embedding comes
    memory_mask  (T,) bool, true where an embedding comes; the m-th true position takes the m-th embedding
    """

    ids: Tensor
    memory_mask: Tensor


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt ready for the generator: it ends where the answer's first token begins.

    ids          (T,) int64
    memory_mask  (T,) bool
    memory       (M, d), M = memory_mask.sum(); (0, 0) where every passage is text
    """

    ids: Tensor
    memory_mask: Tensor
    memory: Tensor

    @property
    def tokens(self) -> int:
        """Positions the generator reads: text tokens and memory embeddings alike."""
        return self.ids.shape[0]

    def begins_with(self, prefix: Tensor) -> bool:
        """Whether this is the tokens `prefix` (P,) int64 and something more."""
        size = len(prefix)
        same = self.tokens > size and torch.equal(self.ids[:size], prefix)
        return same and not bool(self.memory_mask[:size].any())


class PromptTemplate:
    """`config`'s words and `tokenizer`'s chat template, tokenised once. Safe to share between threads once built.

    Raises BaseModelError for a chat template that does not work.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> None:
        self.tokenizer = tokenizer
        try:
            self._head, self._tail, self.end_id = _chat_segments(tokenizer, config.system)
        # A chat template is a program, which may raise anything.
        except Exception as error:
            raise BaseModelError(f"the generator's chat template cannot be used: {first_line(error)}") from None
        self._background = encode(tokenizer, "Background:").ids
        self._question = encode(tokenizer, "\nQuestion: ").ids
        self._labels: dict[int, list[int]] = {}
        # What every prompt with a passage in it begins with.
        self.prefix: tuple[int, ...] = (*self._head, *self._background, *self._label(1))

    def layout(self, query: str, contents: Iterable[Content]) -> Layout:
        """Lay out a prompt with one content a passage, in the order given."""
        background = self.background(contents)
        question = torch.tensor(self.question_ids(query), dtype=torch.int64)
        ids = torch.cat([background.ids, question])
        return Layout(ids, torch.cat([background.memory_mask, torch.zeros(len(question), dtype=torch.bool)]))

    def background(self, contents: Iterable[Content]) -> Layout:
        """What stands before the question in `layout`."""
        ids = self._head + self._background
        spans: list[tuple[int, int]] = []
        for number, content in enumerate(contents, start=1):
            ids += self._label(number)
            spans.append((len(ids), len(ids) + content.memory_tokens))
            ids += repeat(MEMORY_ID, content.memory_tokens)
            ids += content.text_ids
        mask = torch.zeros(len(ids), dtype=torch.bool)
        for start, end in spans:
            mask[start:end] = True
        return Layout(torch.tensor(ids, dtype=torch.int64), mask)

    def question_ids(self, query: str) -> list[int]:
        """What follows the passages: the question, and all up to where the answer begins."""
        return self._question + encode(self.tokenizer, query).ids + self._tail

    def frame(self, query: str, passages: int) -> list[int]:
        """Tokens of a prompt around its passages, by how many there are: from none to `passages`."""
        labels = (len(self._label(number)) for number in range(1, passages + 1))
        around = len(self._head) + len(self._background) + len(self.question_ids(query))
        return list(accumulate(labels, initial=around))

    def build(self, query: str, blocks: Sequence[Block]) -> Prompt:
        """The prompt of `query` with one block a passage, in the order given."""
        memories = [block.memory for block in blocks if block.memory is not None]
        layout = self.layout(query, (block.content for block in blocks))
        memory = torch.cat(memories) if memories else torch.zeros(0, 0, dtype=torch.float32)  # (M, d)
        return Prompt(layout.ids, layout.memory_mask, memory)

    def answer_ids(self, text: str) -> list[int]:
        """What the generator should write for the answer `text`: its tokens and the end-of-turn token."""
        return [*encode(self.tokenizer, text).ids, self.end_id]

    def _label(self, number: int) -> list[int]:
        """`\\n[number] `, tokenised once for each number."""
        if number not in self._labels:
            self._labels[number] = encode(self.tokenizer, f"\n[{number}] ").ids
        return self._labels[number]


def stack_prompts(prompts: Sequence[Prompt]) -> Prompt:
    """One batch of `prompts`, padded on the right: ids and memory_mask `(B, T)`, memory `(sum of M, d)`."""
    memories = [prompt.memory for prompt in prompts if prompt.memory.shape[0]]
    return Prompt(
        pad_sequence([prompt.ids for prompt in prompts], batch_first=True),
        pad_sequence([prompt.memory_mask for prompt in prompts], batch_first=True),
        torch.cat(memories) if memories else torch.zeros(0, 0, dtype=torch.float32),
    )


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends an assistant's turn in this tokenizer's chat template, or its end-of-sequence token.

    Raises ValueError where the tokenizer has neither.
    """
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": USER}, {"role": "assistant", "content": ASSISTANT}]
        after = _render(tokenizer, messages, add_generation_prompt=False).partition(ASSISTANT)[2]
        specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        for token in _control_ids(tokenizer, after):
            if token in specials:
                return token
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token")
    return int(tokenizer.eos_token_id)


def _chat_segments(tokenizer: PreTrainedTokenizerBase, system: str) -> tuple[list[int], list[int], int]:
    """Token ids before and after the user's words, with the system prompt in place, and the end-of-turn id."""
    end = end_of_turn_id(tokenizer)
    if not tokenizer.chat_template:
        head = leading_special_ids(tokenizer) + encode(tokenizer, f"{system}\n\n").ids
        return head, encode(tokenizer, "\nAnswer:\n").ids, end
    rendered = _render_turn(tokenizer)
    before_system, _, rest = rendered.partition(SYSTEM)
    before_user, _, after_user = rest.partition(USER)
    # Control tokens first, words after: the two kinds of tokenising switch the tokenizer's mode.
    controls = [_control_ids(tokenizer, part) for part in (before_system, before_user, after_user)]
    keep_apart(tokenizer, [end, *chain.from_iterable(controls)])
    return [*controls[0], *encode(tokenizer, system).ids, *controls[1]], controls[2], end


def _render_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """One system and one user message with sentinels in them; without a system role, both in the user's."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
    try:
        rendered = _render(tokenizer, messages, add_generation_prompt=True)
    except TemplateError:
        rendered = ""
    if rendered.count(SYSTEM) != 1 or rendered.find(SYSTEM) > rendered.find(USER):
        folded = [{"role": "user", "content": f"{SYSTEM}\n\n{USER}"}]
        rendered = _render(tokenizer, folded, add_generation_prompt=True)
    if rendered.count(USER) != 1:
        raise ValueError("the tokenizer's chat template does not show the user's message exactly once")
    return rendered


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=add_generation_prompt, **TEMPLATE_OPTIONS
    )
    return str(rendered)


def _control_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a template's own words, in which control tokens are control tokens."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]
    return [int(token) for token in ids]
