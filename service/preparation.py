"""From a request's schema to a tokenised job: text is chunked, embeddings that came along are checked and placed.

Runs in a thread of its own pool, never on the event loop: tokenising 100 kB takes tens of milliseconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from core.compressed import CompressedChunk
from core.errors import InvalidInputError
from core.model import Model
from core.passages import Chunk, Passage
from core.pipeline import PreparedRequest, prepare, rows_of, text_prompt_tokens
from core.planning import plan_request
from core.policy import Plan, Policy
from core.rows import ChunkRow
from core.tokenization import encode
from service.embedding_store import EmbeddingStore, StoredPassage, query_sha256
from service.embeddings_codec import decode_embeddings
from service.limits import AnyPassage, check_rate
from service.schemas import AnswerPassage, Embeddings


@dataclass(frozen=True)
class Prepared:
    """A tokenised request.

    rows, places    what is to be compressed, as `plan` has it, and where in `results` each row's outcome belongs
    results         one entry a chunk of `request`: filled for passages that came compressed, else None
    """

    request: PreparedRequest
    policy: Policy
    plan: Plan
    rows: list[ChunkRow]
    places: list[int]
    results: list[CompressedChunk | None]

    @property
    def passage_tokens(self) -> int:
        """Generator tokens of all passages as text; of one that came compressed, what it may take of the prompt.

        That is no less than its embeddings, whatever its caller says of its tokens.
        """
        pairs = zip(self.request.chunks, self.results, strict=True)
        return sum(
            max(len(chunk.generator_ids), 0 if result is None else max(result.tokens, len(result.memory)))
            for chunk, result in pairs
        )

    def text_prompt_tokens(self, model: Model) -> int:
        """Prompt tokens if every passage were text, those included whose text only the caller has."""
        hidden = sum(
            result.tokens
            for chunk, result in zip(self.request.chunks, self.results, strict=True)
            if result is not None and not chunk.generator_ids
        )
        return text_prompt_tokens(model, self.request) + hidden


def prepare_request(
    model: Model,
    query: str,
    passages: Sequence[AnyPassage],
    rate: int | None,
    store: EmbeddingStore,
    policy: Policy,
    max_new_tokens: int,
) -> Prepared:
    """Tokenise a request, and settle what the compressor reads. Raises InputError for what cannot be served."""
    check_rate(rate, model)
    given = {i: given for i, passage in enumerate(passages) if (given := _given(model, query, i, passage, store))}
    plain = [_passage(passage, given.get(i)) for i, passage in enumerate(passages)]
    fresh = [i for i in range(len(plain)) if i not in given]
    tokenised = prepare(model, query, [plain[i] for i in fresh]) if fresh else PreparedRequest(query, (), [], ())
    chunks: list[tuple[Chunk, CompressedChunk | None]] = [
        (replace(chunk, passage=fresh[chunk.passage]), None) for chunk in tokenised.chunks
    ]
    for i, entry in given.items():
        if policy.mode == "text" and not plain[i].text:
            raise InvalidInputError(f"passages.{i}.text", "is required: mode text cannot show embeddings as text")
        chunks.append((_whole_chunk(model, i, plain[i]), _compressed(model, entry)))
    chunks.sort(key=lambda item: item[0].passage)  # stable: the chunks of one passage keep their order
    request = replace(tokenised, passages=tuple(plain), chunks=tuple(chunk for chunk, _ in chunks))
    results = [result for _, result in chunks]
    plan = plan_request(model, request, policy, rate, max_new_tokens, results)
    rows = rows_of(model, request, plan.rate)
    places = [place for place, chunk in enumerate(request.chunks) if chunk.passage in plan.read]
    return Prepared(request, policy, plan, [rows[place] for place in places], places, results)


def _passage(passage: AnyPassage, given: StoredPassage | None) -> Passage:
    if isinstance(passage, str):
        return Passage(passage)
    if passage.text is None and given is not None:
        return Passage(given.text, given.title, passage.id)
    return Passage(passage.text or "", passage.title, passage.id)


def _given(model: Model, query: str, index: int, passage: AnyPassage, store: EmbeddingStore) -> StoredPassage | None:
    """The embeddings that came with a passage, inline or by reference."""
    if not isinstance(passage, AnswerPassage):
        return None
    if passage.embedding_id is not None:
        field = f"passages.{index}.embedding_id"
        stored = store.get(passage.embedding_id)
        if stored is None:
            raise InvalidInputError(field, "is not known here (any more): compress the passage again")
        _check_version(model, stored.checkpoint, field)
        _check_query(query, stored.query_sha256, field)
        return stored
    if passage.embeddings is None:
        return None
    field = f"passages.{index}.embeddings"
    _check_version(model, passage.embeddings.checkpoint, f"{field}.checkpoint")
    _check_query(query, passage.embeddings.query_sha256, f"{field}.query_sha256")
    return _decode(model, passage, passage.embeddings, field)


def _decode(model: Model, passage: AnswerPassage, embeddings: Embeddings, field: str) -> StoredPassage:
    memory = decode_embeddings(
        embeddings.data,
        embeddings.dtype,
        embeddings.shape,
        model.generator.hidden_size,
        model.generator.max_tokens,
        field,
        model.generator.dtype,
    )
    _check_claim(model, embeddings.tokens, len(memory), f"{field}.tokens")
    return StoredPassage(
        memory=memory,
        score=embeddings.score,
        tokens=embeddings.tokens,
        title=passage.title,
        text=passage.text or "",
        checkpoint=embeddings.checkpoint,
        query_sha256=embeddings.query_sha256,
    )


def _check_claim(model: Model, tokens: int, rows: int, field: str) -> None:
    """Tokens saved are counted from what the caller says: no embedding stands for more than the largest rate."""
    most = rows * max(model.config.compressor.rates)
    if tokens > most:
        raise InvalidInputError(field, f"{tokens} is over the limit of {most} for {rows} memory embeddings")


def _check_version(model: Model, checkpoint: str, field: str) -> None:
    if checkpoint != model.name:
        raise InvalidInputError(field, f"these embeddings are another checkpoint's; {model.name} serves now")


def _check_query(query: str, made_for: str | None, field: str) -> None:
    """Embeddings keep what answers their own query; under another they would be answered from, and wrongly."""
    if made_for is not None and made_for != query_sha256(query):
        message = "these embeddings were made for another query: compress the passage again for this one"
        raise InvalidInputError(field, message)


def _whole_chunk(model: Model, index: int, passage: Passage) -> Chunk:
    """Stands for a passage that came compressed; with its tokens where its text is known, so that it can be shown."""
    tokens = encode(model.generator.tokenizer, passage.content) if passage.text else None
    return Chunk(
        passage=index,
        start=0,
        end=len(passage.content),
        generator_ids=tokens.ids if tokens else [],
        generator_spans=tokens.spans if tokens else [],
        compressor_ids=[],
        compressor_index=[],
    )


def _compressed(model: Model, entry: StoredPassage) -> CompressedChunk:
    memory = entry.memory.to(model.device, model.generator.dtype)
    return CompressedChunk(
        start=0,
        end=len(entry.title) + len(entry.text),
        tokens=entry.tokens,
        memory=memory,
        score=entry.score,
        weights=None,
    )
