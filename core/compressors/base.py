"""What every compressor is: a backbone that reads rows, learned slots, a readout and a relevance head."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from core.config import CompressorConfig
from core.errors import ConfigError
from core.readouts import Embed, build_readout, take
from core.rows import RowBatch, RowFormat


@dataclass(frozen=True)
class CompressorOutput:
    """One forward pass over B rows.

    memory (B, L, d_generator), padded as `RowBatch.memory_mask` says; scores (B,) float32 raw relevance scores;
    weights (B, L, G) float32 and logits (B, W, G) float32 where the readout attends over the chunk, else None.
    """

    memory: Tensor
    scores: Tensor
    weights: Tensor | None
    logits: Tensor | None


def check_longest_row(row_format: RowFormat, config: CompressorConfig, positions: int | None, reader: str) -> None:
    """Raises ConfigError where `config` allows longer rows than the `positions` of `reader`; None: no limit."""
    longest = row_format.longest(config)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"compressor: rows of up to {longest} tokens are over the {reader}'s {positions} positions; "
            "lower query_tokens or chunk_tokens, or raise rates"
        )


class Compressor(nn.Module):
    """Reads `[query][chunk][MEM_1..MEM_l][RR]` and writes memory embeddings and a relevance score in one pass.

    The slots are parameters of their own (OSCAR sec. 3.1 and 4.4), so no vocabulary is resized: `slots` is
    (max_memory_tokens + 1, embedding width) with [RR] last. Subclasses give the backbone and its row format.

    causal  whether a position of the backbone sees only what stands before it
    """

    causal = False

    def __init__(
        self,
        config: CompressorConfig,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        row_format: RowFormat,
        generator_width: int,
    ) -> None:
        super().__init__()
        width = int(backbone.config.hidden_size)
        self.config = config
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.row_format = row_format
        self.slots = nn.Parameter(torch.zeros(config.max_memory_tokens + 1, self._embedding_table.shape[1]))
        self.readout = build_readout(config, width, generator_width)
        self.relevance = nn.Linear(width, 1)
        accepts = "token_type_ids" in inspect.signature(backbone.forward).parameters
        self.takes_segments = accepts and getattr(backbone.config, "type_vocab_size", 2) > 1  # RoBERTa has but one

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.slots.device

    @property
    def _embedding_table(self) -> Tensor:
        table = self._embeddings.weight
        assert isinstance(table, Tensor)  # every text model of transformers keeps one table
        return table

    @property
    def _embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def initialise_slots(self, generator: torch.Generator) -> None:
        """Start every slot near a token the backbone knows: its mask token, or else the mean of its vocabulary."""
        table = self._embedding_table
        mask_id = self.tokenizer.mask_token_id
        centre = table.mean(0) if mask_id is None else table[mask_id]
        noise = torch.randn(self.slots.shape, generator=generator, dtype=torch.float32)
        noise *= table.float().std().cpu() * 0.5
        with torch.no_grad():
            self.slots.copy_(centre.float().cpu() + noise)

    @property
    def reads_chunk(self) -> bool:
        """Whether the readout looks at hidden states of the chunk, and not only of slots."""
        return self.config.readout != "memory"

    def inputs(self, ids: Tensor, slots: Tensor) -> Tensor:
        """Input embeddings (B, T, embedding width): of the token, or of the slot where one stands."""
        tokens = self._embeddings(ids)  # (B, T, embedding width)
        # A look-up, not `self.slots[...]`: its gradient is cheaper than that of indexing.
        learned = functional.embedding(slots.clamp(min=0), self.slots)  # (B, T, embedding width)
        return torch.where((slots >= 0).unsqueeze(-1), learned.to(tokens.dtype), tokens)

    def hidden(self, batch: RowBatch, mask: Tensor | dict[str, Tensor] | None = None) -> Tensor:
        """Hidden states (B, T, width) of all positions, in one pass of the backbone.

        `mask`: a ready additive mask (B, 1, T, T), by kind of layer where the backbone mixes them.
        """
        inputs = self.inputs(batch.ids, batch.slots)
        extra = {"token_type_ids": batch.segments} if self.takes_segments else {}
        # Padding is on the right, where causal attention never looks: with no mask it runs on its fastest kernel, which
        # takes grouped heads as they are and skips what is masked.
        if mask is None and not self.causal:
            mask = batch.mask.long()
        output = self.backbone(inputs_embeds=inputs, attention_mask=mask, **extra)
        return output.last_hidden_state  # type: ignore[no-any-return]  # transformers outputs are untyped

    def forward(self, batch: RowBatch, embed: Embed) -> CompressorOutput:
        """Compress B rows; `embed` is the generator's input embedding (int64 ids -> (..., d_generator))."""
        return self.read(self.hidden(batch), batch, embed)

    def read(self, hidden: Tensor, batch: RowBatch, embed: Embed) -> CompressorOutput:
        """What the readout and the relevance head make of the hidden states (B, T, width) of B rows."""
        read = self.readout(hidden, batch, embed)
        at_relevance = take(hidden, batch.relevance_position.unsqueeze(1)).squeeze(1)  # (B, width)
        # In float32 whatever the weights are: bfloat16 scores of like passages would tie.
        head = self.relevance
        scores = (at_relevance.float() * head.weight.float()).sum(-1) + head.bias.float()  # (B,)
        return CompressorOutput(read.memory, scores, read.weights, read.logits)
