"""One forward pass of a micro-batch and the parts of its loss. Knows no optimiser, no files and no schedule."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from core.kv_slots import AttentionMasks
from core.model import Model
from core.prompts import Content
from core.rows import collate_rows, plan_batches
from training.batches import Question, TrainExample
from training.config import LossConfig
from training.losses import alignment_loss, answer_loss, kl_loss, relevance_loss
from training.packing import Packed, pack, packed_mask


@dataclass
class Parts:
    """Sums over a micro-batch: `losses` are tensors to be differentiated, `counts` what to divide them by.

    real, padded  positions that hold tokens, and all positions computed
    pointed       rows whose first pointer's best guess is right
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    real: int = 0
    padded: int = 0
    pointed: int = 0


@dataclass(frozen=True)
class CompressedRows:
    """All rows of a micro-batch, in order: memory embeddings, and the score of each row (R,)."""

    memory: list[Tensor]
    scores: Tensor


class Objective(nn.Module):
    """Compressor and generator under the training objective; a module, so that it can be wrapped and replicated."""

    def __init__(self, model: Model, loss: LossConfig, max_tokens: int, dropout: bool = True) -> None:
        """`max_tokens`: padded positions of one pass of the compressor; `dropout`: whether its backbone's own is on."""
        super().__init__()
        self.compressor = model.compressor
        self.generator = model.generator
        self.model = model
        self.loss = loss
        self.max_tokens = max_tokens
        self.dropout = dropout

    def train(self, mode: bool = True) -> "Objective":
        """As ever, but the backbone stays without dropout where that was asked for."""
        super().train(mode)
        if not self.dropout:
            self.compressor.backbone.eval()
            for module in self.compressor.backbone.modules():
                # A layer saves activations only in training; its own flag alone switches no dropout on below it.
                module.training = mode and getattr(module, "gradient_checkpointing", False) is True
        return self

    def forward(self, examples: Sequence[TrainExample]) -> Parts:
        """Sums of every part of the loss over `examples`; nothing of none."""
        parts = Parts()
        if not examples:
            return parts
        with_text_only = all(example.mode == "text" for example in examples)
        by_relevance = self.model.config.prompt.passage_order == "relevance"
        compressed = None
        if self.loss.needs_compressor or by_relevance or not with_text_only:
            compressed = self._compress(examples, parts)
        scores = None if compressed is None else passage_scores(examples, compressed.scores)
        if scores is not None and self.loss.relevance > 0:
            self._add_relevance(examples, scores, parts)
        if self.loss.needs_generator:
            self._add_answers(examples, compressed, scores, parts)
        return parts

    def _compress(self, examples: Sequence[TrainExample], parts: Parts) -> CompressedRows:
        """Run the compressor on every row, in batches of like length, and add the alignment loss."""
        rows = [row for example in examples for row in example.rows]
        hits = [hit for example in examples for hit in example.hits]
        compressor, row_format = self.compressor, self.compressor.row_format
        lengths = [row_format.length(row) for row in rows]
        memory: list[Tensor] = [torch.empty(0)] * len(rows)
        scores: list[Tensor] = [torch.empty(0)] * len(rows)
        for indices in plan_batches(lengths, self.max_tokens):
            batch = collate_rows([rows[i] for i in indices], row_format, self.model.config.compressor.max_memory_tokens)
            output = compressor(batch.to(compressor.device), self.generator.embed)
            parts.real += sum(lengths[i] for i in indices)
            parts.padded += batch.mask.numel()
            for place, index in enumerate(indices):
                memory[index] = output.memory[place, : rows[index].memory_tokens]
                scores[index] = output.scores[place]
            if hits and output.logits is not None:
                exists = batch.memory_mask[:, :: compressor.config.pointer_window]  # (B, W)
                self._add_alignment(output.logits, exists, [hits[i] for i in indices], parts)
        return CompressedRows(memory, torch.stack(scores))

    def _add_alignment(self, logits: Tensor, exists: Tensor, hits: Sequence[Sequence[int]], parts: Parts) -> None:
        right = torch.zeros(logits.shape[0], logits.shape[2], dtype=torch.bool)  # (B, G)
        for place, tokens in enumerate(hits):
            right[place, list(tokens)] = True
        right = right.to(logits.device)
        labelled = right.any(1)
        best = logits[:, 0].argmax(-1, keepdim=True)  # (B, 1)
        parts.pointed += int((right.gather(1, best).squeeze(1) & labelled).sum())
        add(parts, "alignment", alignment_loss(logits, right, exists.to(logits.device)), int(labelled.sum()))

    def _add_relevance(self, examples: Sequence[TrainExample], scores: Sequence[Tensor], parts: Parts) -> None:
        known = [(index, example) for index, example in enumerate(examples) if example.relevance is not None]
        if not known:
            return
        predicted = torch.cat([scores[index] for index, _ in known])  # (P,)
        targets = torch.tensor([value for _, example in known for value in example.relevance or []])
        owner = torch.tensor([index for index, example in known for _ in example.relevance or []])
        loss = relevance_loss(
            predicted, targets.to(predicted.device), owner.to(predicted.device), self.loss.relevance_kind
        )
        add(parts, "relevance", loss, len(targets))

    def _add_answers(
        self,
        examples: Sequence[TrainExample],
        compressed: CompressedRows | None,
        scores: Sequence[Tensor] | None,
        parts: Parts,
    ) -> None:
        """Splice, run the generator once over prompts and answers, and add the loss on answer tokens only."""
        sequences, memories, questions = [], [], []
        first = 0
        for index, example in enumerate(examples):
            memory = compressed.memory[first : first + len(example.rows)] if compressed else []
            first += len(example.rows)
            if not example.questions:
                continue
            prefix, shown, used = lay_out(self.model, example, memory, scores[index] if scores else None)
            own = example.questions
            tails = [self.model.template.question_ids(question.query) for question in own]
            sequences.append(pack(prefix, shown, [(t, q.answer_ids) for t, q in zip(tails, own, strict=True)]))
            questions += own
            memories += used
        if not sequences:
            return
        hidden = self._run_generator(sequences, memories, parts)  # (B, T, d)
        rows = torch.cat([torch.full_like(one.predictors, row) for row, one in enumerate(sequences)])  # (n,)
        places = torch.cat([one.predictors for one in sequences])  # (n,)
        logits = self.generator.next_logits(hidden[rows.to(hidden.device), places.to(hidden.device)])  # (n, V)
        targets = torch.tensor([token for question in questions for token in question.answer_ids], device=logits.device)
        if self.loss.answer > 0:
            add(parts, "answer", answer_loss(logits, targets), len(targets))
        if self.loss.kl > 0:
            self._add_kl(logits, questions, parts)

    def _add_kl(self, logits: Tensor, questions: Sequence[Question], parts: Parts) -> None:
        """Divergence from the teacher at the answer tokens that it has logits for: logits (n, V) of all of them."""
        first = 0
        for question in questions:
            own = logits[first : first + len(question.answer_ids)]  # (t, V)
            first += len(question.answer_ids)
            if question.teacher is not None:
                ids, logprobs = question.teacher.top_ids.to(own.device), question.teacher.top_logprobs.to(own.device)
                add(parts, "kl", kl_loss(own, ids, logprobs, self.loss.kl_temperature), len(own))

    def _run_generator(self, sequences: Sequence[Packed], memories: list[Tensor], parts: Parts) -> Tensor:
        """Hidden states (B, T, d) of `sequences`, padded on the right."""
        device = self.generator.device
        ids = pad_sequence([one.ids for one in sequences], batch_first=True).to(device)  # (B, T)
        memory_mask = pad_sequence([one.memory_mask for one in sequences], batch_first=True).to(device)
        memory = torch.cat(memories) if memories else torch.zeros(0, self.generator.hidden_size, device=device)
        embeddings = self.generator.splice(ids, memory_mask, memory)  # (B, T, d)
        lengths = torch.tensor([len(one.ids) for one in sequences])
        real = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)  # (B, T)
        parts.real += int(lengths.sum())
        parts.padded += real.numel()
        positions = None
        mask: Tensor | dict[str, Tensor] | None
        if any(one.segments[-1] > 1 for one in sequences):
            positions = pad_sequence([one.positions for one in sequences], batch_first=True).to(device)
            masks = AttentionMasks(self.generator.model.config, embeddings.dtype)
            mask = packed_mask(sequences, positions, masks)
        else:
            mask = None if bool(real.all()) else real.long().to(device)
        output = self.generator.model.base_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


def add(parts: Parts, name: str, loss: Tensor, count: int) -> None:
    """Add one summed loss and its count to `parts`."""
    parts.losses[name] = parts.losses[name] + loss if name in parts.losses else loss
    parts.counts[name] = parts.counts.get(name, 0) + count


def passage_scores(examples: Sequence[TrainExample], scores: Tensor) -> list[Tensor]:
    """Row scores (R,) -> for each example the scores (P,) of its passages: the best of each one's chunks."""
    result, first = [], 0
    for example in examples:
        own = scores[first : first + len(example.rows)]
        first += len(example.rows)
        owner = torch.tensor([row.chunk.passage for row in example.rows], device=scores.device)
        empty = torch.zeros(len(example.request.passages), device=scores.device)
        result.append(empty.scatter_reduce(0, owner, own, "amax", include_self=False))
    return result


def lay_out(
    model: Model, example: TrainExample, memory: Sequence[Tensor], scores: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One example's prompt before its question: ids (P,), memory mask (P,), memory embeddings in prompt order."""
    count = len(example.request.passages)
    by_score = list(range(count))
    if scores is not None:
        values = scores.tolist()
        by_score = sorted(by_score, key=lambda index: -values[index])
    shown = set(by_score[: model.config.prompt.hybrid_top]) if example.mode == "hybrid" else set()
    if example.mode == "text":
        shown = set(range(count))
    order = by_score if model.config.prompt.passage_order == "relevance" else range(count)
    contents: list[Content] = []
    used: list[Tensor] = []
    for index in order:
        mine = [place for place, row in enumerate(example.rows) if row.chunk.passage == index]
        embedded = [] if example.mode == "text" else mine
        read = mine if index in shown else []
        used += [memory[place] for place in embedded]
        contents.append(
            Content(
                sum(example.rows[place].memory_tokens for place in embedded),
                [token for place in read for token in example.rows[place].chunk.generator_ids],
            )
        )
    background = model.template.background(contents)
    return background.ids, background.memory_mask, used
