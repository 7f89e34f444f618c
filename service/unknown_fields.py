"""A name that a request's schema does not know, and the one that was meant. Knows no schemas."""

from collections.abc import Collection
from difflib import get_close_matches

UNKNOWN = "unknown field"
LONGEST = 64  # characters of a caller's name that are repeated, and of one that is compared
ALIKE = 0.8  # of 1, as difflib counts: `top_n` and `top_k`, which are not the same, are less alike

# Names for one thing in the APIs that callers know. A schema has one of each group, or the first is the nearest.
SAME = (
    ("query", "question", "prompt", "messages", "input", "q"),
    ("passages", "documents", "texts", "contexts", "context", "chunks", "docs"),
    ("text", "content", "page_content", "body", "passage", "snippet"),
    ("max_new_tokens", "max_tokens", "max_completion_tokens", "max_output_tokens", "max_length"),
    ("top_n", "limit"),
)


def shown(name: str) -> str:
    """A caller's name for a field, as an error may repeat it: not long, and nothing that does not print."""
    return "".join(each if each.isprintable() else "?" for each in name[:LONGEST])


def meant_by(name: str, known: Collection[str]) -> str | None:
    """Which of the `known` names an unknown one stands for, if any."""
    if len(name) > LONGEST:
        return None
    plain = {_plain(each): each for each in known}
    spelt = _plain(name)
    same = (_plain(each) for group in SAME if spelt in map(_plain, group) for each in group)
    nearest = (spelt, *same, *get_close_matches(spelt, plain, 1, ALIKE))
    return next((plain[each] for each in nearest if each in plain), None)


def sent_for(name: str, given: Collection[str]) -> str | None:
    """Which of the names `given` is another word for a field that is missing, if any."""
    return next((each for group in SAME if name in group for each in group if each in given), None)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
