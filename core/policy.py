"""How each passage reaches the generator, as text, compressed, both or not at all, under a bound on prompt tokens.

Pure functions of sizes, relevance and costs: equal inputs give equal choices. Knows no models and no tensors.

Two steps. Before the compressor runs, only lengths are known: `plan` says what it should read, and at which rate.
Once it has scored the passages, `choose` takes them one by one, best first:

1. A passage under `min_relevance` is dropped.
2. Each of the others is shown in the form that the mode wants for it, if that fits into what is left of the bound. In
   `hybrid` that is text behind the embeddings for the best few, or else the embeddings alone. One of which nothing fits
   is dropped.
3. In `auto`, where the caller gave a bound, what room remains goes to text behind the embeddings, best first, each that
   fits, of passages that are relevant enough to hold an answer.

Embeddings stay where there is text too: they know what the query asks of the passage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from core.config import Mode

RequestMode = Literal["compressed", "text", "hybrid", "auto"]
Shown = Literal["text", "compressed", "hybrid", "dropped"]  # hybrid: embeddings, then text
AS_EMBEDDINGS: frozenset[Shown] = frozenset({"compressed", "hybrid"})
AS_TEXT: frozenset[Shown] = frozenset({"text", "hybrid"})
# Why a passage is shown as it is:
#   asked                the mode asked for shows every passage so
#   most_relevant        one of the few that `hybrid` shows as text too
#   relevant             `auto` had room to show it as text too, and it is relevant enough to hold an answer
#   pays                 compressing it costs less than reading it as text would
#   no_gain              compressing it would not pay: too short, or the compressor costs more than it saves
#   no_text              only its embeddings are known here
#   over_budget          the form that it should have does not fit into the bound on the prompt
#   below_min_relevance  it is less relevant than the caller wants to keep
Reason = Literal[
    "asked", "most_relevant", "relevant", "pays", "no_gain", "no_text", "over_budget", "below_min_relevance"
]
# Why the compressor reads what it reads: the mode asks for it; measured costs decide; or relevance has to be known,
# because not everything fits or `min_relevance` is asked for.
PlanReason = Literal["asked", "costs", "relevance"]


@dataclass(frozen=True, slots=True)
class Policy:
    """What a caller asks for.

    hybrid_top          passages that `hybrid` shows as text too; None: as many as the checkpoint is set to
    max_prompt_tokens   bound on the generator's prompt, template included; None: none but the generator's own
    min_relevance       passages that are less relevant are dropped
    hops                2: all passages but the best are read again, for the query and that one (`core.hops`)
    """

    mode: RequestMode = "compressed"
    hybrid_top: int | None = None
    max_prompt_tokens: int | None = None
    min_relevance: float = 0.0
    hops: int = 1


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """Seconds for each token that the compressor reads, and for each position of the generator's prompt."""

    compressor_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class Size:
    """One passage before it is compressed, in tokens.

    text        as text, generator tokens; None where only its embeddings are known
    memory      as memory embeddings
    compressor  what the compressor reads for it, query and slots included; 0 for one that came compressed
    """

    text: int | None
    memory: int
    compressor: int


@dataclass(frozen=True, slots=True)
class Estimates:
    """Seconds from compression to the first token: all as text, all compressed, and each passage as costs less."""

    text_s: float
    compressed_s: float
    hybrid_s: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What is settled before relevance is known.

    rate        the compression rate
    read        indices of the passages that the compressor reads; the others are shown as text, or came compressed
    estimates   None where no costs are known
    """

    rate: int
    read: frozenset[int]
    reason: PlanReason
    estimates: Estimates | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One passage to choose for: what it takes as text and as embeddings, None for a form that it does not have.

    relevance   calibrated, 0..1; None where the compressor has not read it
    """

    index: int
    relevance: float | None
    text: int | None
    memory: int | None


@dataclass(frozen=True, slots=True)
class Choice:
    """How one passage is shown, why, and what it takes of the prompt, its number left out."""

    mode: Shown
    reason: Reason
    tokens: int


def plan(
    policy: Policy,
    sizes: Mapping[int, Sequence[Size]],
    frame: Sequence[int],
    room: int | None,
    costs: TokenCosts | None,
) -> Plan:
    """What the compressor reads.

    sizes   of all passages, by rate; the rate that was asked for first, then those `auto` may fall back on, coarser
            ones later. It takes the first at which every passage fits, or else the last.
    frame   tokens of a prompt around its passages, by how many there are, from none to all
    room    most tokens of a prompt; None: no bound
    costs   only `auto` needs them, and takes compressing for free without
    """
    asked, around = next(iter(sizes)), frame[-1]
    fresh = frozenset(i for i, size in enumerate(sizes[asked]) if size.compressor)
    if policy.mode != "auto":
        return Plan(asked, fresh, "asked", estimate(sizes[asked], around, costs))
    fitting = (rate for rate, each in sizes.items() if room is None or around + sum(map(_smallest, each)) <= room)
    rate = next(fitting, list(sizes)[-1])
    chosen = sizes[rate]
    estimates = estimate(chosen, around, costs)
    as_text = around + sum(size.memory if size.text is None else size.text for size in chosen)
    if policy.min_relevance > 0 or (room is not None and as_text > room):
        return Plan(rate, fresh, "relevance", estimates)
    each = costs or FREE
    paying = frozenset(i for i in fresh if _compressed_s(chosen[i], each) < _text_s(chosen[i], each))
    return Plan(rate, paying, "costs", estimates)


FREE = TokenCosts(compressor_s=0.0, prefill_s=1.0)


def estimate(sizes: Sequence[Size], frame: int, costs: TokenCosts | None) -> Estimates | None:
    """What each way to show all passages would take; `frame` is the prompt around them, in tokens."""
    if costs is None:
        return None
    around = costs.prefill_s * frame
    pairs = [(_text_s(size, costs), _compressed_s(size, costs)) for size in sizes]
    return Estimates(
        text_s=around + sum(text for text, _ in pairs),
        compressed_s=around + sum(compressed for _, compressed in pairs),
        hybrid_s=around + sum(map(min, pairs)),
    )


def _text_s(size: Size, costs: TokenCosts) -> float:
    return costs.prefill_s * (size.memory if size.text is None else size.text)


def _compressed_s(size: Size, costs: TokenCosts) -> float:
    return costs.compressor_s * size.compressor + costs.prefill_s * size.memory


def _smallest(size: Size) -> int:
    return size.memory if size.text is None else min(size.text, size.memory)


def choose(
    policy: Policy, best_first: Sequence[Candidate], frame: Sequence[int], room: int | None, threshold: float
) -> dict[int, Choice]:
    """How each passage is shown, by its index.

    best_first  all passages, most relevant first
    frame, room as in `plan`
    threshold   relevance from which a passage counts as holding an answer
    """
    chosen: dict[int, Choice] = {}
    with_text = [passage.index for passage in best_first if passage.text is not None]
    most_relevant = with_text[: policy.hybrid_top] if policy.mode == "hybrid" else []
    used = shown = 0
    for passage in best_first:
        forms = _forms(policy, passage, passage.index in most_relevant)
        fitting = (form for form in forms if room is None or frame[shown + 1] + used + form.tokens <= room)
        if passage.relevance is not None and passage.relevance < policy.min_relevance:
            choice = Choice("dropped", "below_min_relevance", 0)
        else:
            choice = next(fitting, Choice("dropped", "over_budget", 0))
        chosen[passage.index] = choice
        used += choice.tokens
        shown += choice.mode != "dropped"
    if policy.mode == "auto" and policy.max_prompt_tokens is not None and room is not None:
        _add_text(chosen, best_first, room - frame[shown] - used, threshold)
    return chosen


def _forms(policy: Policy, passage: Candidate, most_relevant: bool) -> Sequence[Choice]:
    """Those that the mode allows, the wanted one first."""
    text, memory = passage.text, passage.memory
    if memory is None or (policy.mode == "text" and text is not None):
        assert text is not None  # a passage has one form at least
        return (Choice("text", "asked" if policy.mode == "text" else "no_gain", text),)
    if policy.mode == "compressed":
        return (Choice("compressed", "asked", memory),)
    if text is None:
        return (Choice("compressed", "no_text", memory),)
    if policy.mode == "auto":
        return (Choice("text", "no_gain", text) if text <= memory else Choice("compressed", "pays", memory),)
    if most_relevant:
        return (Choice("hybrid", "most_relevant", memory + text), Choice("compressed", "over_budget", memory))
    return (Choice("compressed", "asked", memory),)


def _add_text(chosen: dict[int, Choice], best_first: Sequence[Candidate], left: int, threshold: float) -> None:
    """Spend `left` tokens on the text of passages that are relevant and shown as embeddings."""
    for passage in best_first:
        choice, text = chosen[passage.index], passage.text
        relevant = passage.relevance is not None and passage.relevance >= threshold
        if relevant and choice.mode == "compressed" and text is not None and text <= left:
            chosen[passage.index] = Choice("hybrid", "relevant", choice.tokens + text)
            left -= text


def overall(choices: Sequence[Choice]) -> Mode | None:
    """What the choices amount to; None where every passage was dropped."""
    shown: set[Mode] = {choice.mode for choice in choices if choice.mode != "dropped"}
    return "hybrid" if len(shown) > 1 else next(iter(shown), None)
