"""What a causal backbone made of the first positions of rows, kept and taken up again by rows that begin alike.

A position of a causal backbone never sees what comes after it, so its keys, values and hidden states are the same
whatever follows. Knows layers' keys and values, neither compressors nor what the positions hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from core.kv_slots import PassCache

NOWHERE = 2**31  # position of a key that is padding: behind every query


@dataclass(frozen=True, slots=True)
class Prefix:
    """The first P positions of a row.

    keys_values  (N, 2, kv_heads, P, head_dim) of each layer, keys turned to positions 0 .. P - 1
    hidden       (P, width) hidden states of the last layer; None where no readout looks at them
    """

    keys_values: Tensor
    hidden: Tensor | None

    @property
    def length(self) -> int:
        """Positions."""
        return self.keys_values.shape[3]

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.keys_values.nbytes + (0 if self.hidden is None else self.hidden.nbytes)


class Recorder(PassCache):
    """In the place of transformers' `Cache` in a pass over whole rows: keeps what every layer makes.

    layers  (keys, values), each `(B, kv_heads, T, head_dim)`, in the order of the layers
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by each layer; it attends to its own."""
        self.layers.append((keys, values))
        return keys, values

    def prefix(self, row: int, length: int, hidden: Tensor | None, device: torch.device) -> Prefix:
        """A copy of the first `length` positions of one row on `device`; `hidden` (B, T, width) of the same pass."""
        keys = self.layers[0][0]
        shape = (len(self.layers), 2, keys.shape[1], length, keys.shape[3])
        kept = torch.empty(shape, dtype=keys.dtype, device=device)
        for layer, pair in enumerate(self.layers):
            for part, tensor in enumerate(pair):
                kept[layer, part] = tensor[row, :, :length]
        states = None if hidden is None else hidden[row, :length].to(device, copy=True)
        return Prefix(kept, states)


class Continuation(Recorder):
    """In the place of transformers' `Cache` in a pass over what follows B prefixes, S positions at most.

    Layers attend to their row's prefix and to what the pass brings. Keys of prefixes stand in slots [0, P), P that of
    the longest; new ones behind them. `key_positions` (B, P + S) says which position each slot is of.
    """

    def __init__(self, prefixes: Sequence[Prefix], positions: Tensor) -> None:
        """`positions` (B, S) int64: where in its row each new token stands."""
        super().__init__()
        size, new = positions.shape
        longest = max(prefix.length for prefix in prefixes)
        layers, _, heads, _, head_dim = prefixes[0].keys_values.shape
        # Zeros, not empty: a masked position still enters the sum with weight 0, and 0 * NaN is NaN.
        self._slots = torch.zeros(
            (layers, 2, size, heads, longest + new, head_dim),
            dtype=prefixes[0].keys_values.dtype,
            device=positions.device,
        )
        lengths = torch.tensor([prefix.length for prefix in prefixes], device=positions.device)
        for row, prefix in enumerate(prefixes):
            self._slots[:, :, row, :, : prefix.length] = prefix.keys_values
        old = torch.arange(longest, device=positions.device).expand(size, -1)  # (B, P)
        old = old.masked_fill(old >= lengths[:, None], NOWHERE)
        self.key_positions = torch.cat((old, positions), dim=1)
        self._first = longest

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values `(B, kv_heads, S, head_dim)` behind the prefixes; returns all."""
        slots = self._slots[layer_idx]  # (2, B, kv_heads, P + S, head_dim)
        slots[0, :, :, self._first :] = keys
        slots[1, :, :, self._first :] = values
        return slots[0], slots[1]


def rest_positions(lengths: Sequence[int], prefixes: Sequence[Prefix], device: torch.device) -> Tensor:
    """Positions (B, S) behind the prefix of each row of `lengths`; those past a shorter row's end are padding."""
    starts = torch.tensor([prefix.length for prefix in prefixes], device=device)
    rest = max(length - prefix.length for length, prefix in zip(lengths, prefixes, strict=True))
    return starts[:, None] + torch.arange(rest, device=device)


def join_hidden(prefixes: Sequence[Prefix], rest: Tensor, positions: Tensor, width: int) -> Tensor:
    """Hidden states (B, width, d) of whole rows from those of their prefixes, where kept, and `rest` (B, S, d)."""
    # Padding of `rest` may lie behind the batch's width: one position more takes it, and is cut off.
    hidden = rest.new_zeros(rest.shape[0], width + 1, rest.shape[2])
    hidden.scatter_(1, positions.clamp(max=width).unsqueeze(-1).expand_as(rest), rest)
    for row, prefix in enumerate(prefixes):
        if prefix.hidden is not None:
            hidden[row, : prefix.length] = prefix.hidden
    return hidden[:, :width]


def at_positions(values: Tensor, positions: Tensor, padding: int) -> Tensor:
    """Of `values` (B, T), those at `positions` (B, S); `padding` where a position is behind the end."""
    width = values.shape[1]
    return functional.pad(values, (0, 1), value=padding).gather(1, positions.clamp(max=width))
