"""Tokens to text while they arrive: whole characters only, nothing past a stop string. Knows no models.

The pieces a stream gives, joined, are the answer: `DecodeBatch` uses nothing else, streamed or not.
"""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"  # what tokenizers decode the bytes of an unfinished character to


class TextStream:
    """Incremental detokenisation of one answer.

    Decodes from a short, sliding window of tokens: from the start of the last piece given, because the first token of
    a text may lose its space, to the newest. A piece is held back while it ends inside a character, or as long as it
    may grow into a stop string. `stopped` tells that one was found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []  # the window: the last piece's tokens, then those not given yet
        self._given = 0  # tokens of the window whose text was given
        self._held = ""  # text that may be the beginning of a stop string

    def push(self, token_id: int) -> str:
        """Take one more token; the text it completes, perhaps empty. Nothing comes after a stop string."""
        if self.stopped:
            return ""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith(BROKEN):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return self._hold(text)

    def finish(self) -> str:
        """The text still held back, at the end of the answer. A character that the end cuts in two is left out."""
        if self.stopped:
            return ""
        text = self._hold(self._new_text().rstrip(BROKEN))
        held, self._held = self._held, ""
        return text + held

    def _new_text(self) -> str:
        old = self._decode(self._ids[: self._given])
        return self._decode(self._ids)[len(old) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # a list of ids gives one string
        return text

    def _hold(self, text: str) -> str:
        """What of `text` can be given now that `_held` and the stop strings are looked at."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]  # the one that is complete first, however the text is cut into tokens
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
