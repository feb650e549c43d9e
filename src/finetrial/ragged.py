"""The product of attention with dropout on a CPU, for rows of different lengths, some at a time. Child side.

PyTorch's fused kernel has no dropout on a CPU. What it falls back to makes half a dozen passes over tensors of
[rows, heads, length, length], too large for any cache, and keeps three of them for the backward pass. Here all
that is done with some rows while they are in the cache, no longer than the longest of them, and one such tensor
is kept: the probabilities, with a minus sign where they were kept by the dropout (docs/log.md).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._guards import detect_fake_mode
from torch.autograd.function import once_differentiable

from finetrial.dropout import bernoulli_

# Of one [rows, heads, length, length] tensor of a piece; there are three, beside what the products touch.
PIECE_BYTES = 1 << 20
DRAWN_TOGETHER = 4  # elements of a mask, at most, from one word of random bits (dropout.py)


class Padding(NamedTuple):
    """Rows of different lengths, padded to the longest: places; and their tokens, one below the other."""

    real: torch.Tensor  # [places]: whether there is a token
    back: torch.Tensor  # of each place the token there, or one before it
    where: torch.Tensor  # of each token its place

    @classmethod
    def of(cls, counts: Sequence[int], length: int) -> Padding | None:
        """Of rows of so many tokens, which padding follows up to `length`; None: there is none.

        By their number alone, and so also where tensors have shapes only.
        """
        held = sum(counts)
        if held == length * len(counts):
            return None
        each = torch.tensor(counts)
        real = (torch.arange(length) < each[:, None]).view(-1)
        before = torch.arange(0, length * len(counts), length) - (each.cumsum(0) - each)
        where = torch.arange(held) + before.repeat_interleave(each, output_size=held)
        return cls(real, real.cumsum(0) - 1, where)


@dataclass(frozen=True, eq=False)
class Span:
    """Some rows among tokens, which lie one below the other: all of a length, or to be padded to it."""

    own: slice
    rows: int
    length: int
    padding: Padding | None = None

    def take(self, tokens: torch.Tensor, *, blank: bool = False) -> torch.Tensor:
        """[tokens, heads, features] as [rows x heads, length, features] in fp32; `blank`: with 0 at padding."""
        own = tokens[self.own]
        if self.padding is not None:
            own = own.index_select(0, self.padding.back)
            if blank:
                own.mul_(self.padding.real[:, None, None])
        laid = own.view(self.rows, self.length, *own.shape[1:]).transpose(1, 2)
        return (laid[0] if self.rows == 1 else laid.reshape(-1, self.length, own.shape[-1])).float()

    def put(self, tokens: torch.Tensor, values: torch.Tensor) -> None:
        """The opposite, into their places."""
        own, heads = tokens[self.own], tokens.shape[1]
        laid = values.view(self.rows, heads, self.length, -1).transpose(1, 2)
        if self.padding is None:
            own.view(laid.shape).copy_(laid)
        else:
            own.copy_(laid.reshape(-1, *own.shape[1:]).index_select(0, self.padding.where))


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows that are done together: their queries, their keys and values, and what is added to their scores."""

    queries: Span
    keys: Span
    mask: torch.Tensor | None  # broadcast to [rows, heads, queries, keys]

    @property
    def size(self) -> int:
        """Scores of a head."""
        return self.queries.rows * self.queries.length * self.keys.length


@dataclass
class Lengths:
    """How many tokens each row of a batch has, whose tokens lie one below the other."""

    each: Sequence[int]
    known: dict[Any, Any] = field(default_factory=dict)

    def part(self, rows: slice) -> Lengths:
        """Of some of its rows."""
        key = (rows.start, rows.stop)
        return self.known.setdefault(key, Lengths(self.each[rows]))

    def pieces(self, heads: int, *, one_query: bool) -> Sequence[Piece]:
        """All rows in order, as many at a time as have scores of `PIECE_BYTES`; one at least.

        With one query of each row they are the same rows.
        """
        key = (heads, one_query, PIECE_BYTES)
        if key not in self.known:
            self.known[key] = [*self._pieces(heads, one_query=one_query)]
        return self.known[key]

    def _pieces(self, heads: int, *, one_query: bool) -> Iterator[Piece]:
        start = token = 0
        while start < len(self.each):
            end, longest = start + 1, self.each[start]
            for length in self.each[end:]:
                wider = max(longest, length)
                if 4 * heads * (end + 1 - start) * wider * wider > PIECE_BYTES:
                    break
                end, longest = end + 1, wider
            counts = self.each[start:end]
            keys, mask = _span(token, counts), None
            if keys.padding is not None:
                beyond = torch.arange(longest) >= torch.tensor(counts)[:, None, None, None]
                mask = torch.zeros(beyond.shape).masked_fill_(beyond, torch.finfo(torch.float32).min)
            yield Piece(Span(slice(start, end), end - start, 1) if one_query else keys, keys, mask)
            start, token = end, token + sum(counts)


def _span(first: int, counts: Sequence[int]) -> Span:
    """Of rows of these lengths, the first token of which is that one."""
    longest = max(counts)
    return Span(slice(first, first + sum(counts)), len(counts), longest, Padding.of(counts, longest))


def alike(rows: int, queries: int, keys: int, heads: int, mask: torch.Tensor | None) -> Iterator[Piece]:
    """Pieces of rows that are all as long, to whose scores a mask is added, of one row or of all.

    So many rows that no piece but the last breaks off within a word that masks are drawn from.
    """
    one = heads * queries * keys
    words = DRAWN_TOGETHER // math.gcd(DRAWN_TOGETHER, one)
    step = -(-max(1, PIECE_BYTES // (4 * one)) // words) * words
    for start in range(0, rows, step):
        end = min(start + step, rows)
        ours, theirs = (Span(slice(start * n, end * n), end - start, n) for n in (queries, keys))
        yield Piece(ours, theirs, mask if mask is None or len(mask) == 1 else mask[start:end])


def of_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Lengths, p: float, scale: float
) -> torch.Tensor:
    """`dropped` of rows of these lengths: each token attends to its row's; or a query of each row does."""
    pieces = lengths.pieces(query.shape[1], one_query=len(query) < len(key))
    return dropped(query, key, value, pieces, p, scale)


def dropped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pieces: Sequence[Piece], p: float, scale: float
) -> torch.Tensor:
    """softmax(query key' scale + mask), dropped with probability `p`, times value, piece by piece.

    The three and what is given are [tokens, heads, features]. Computed in fp32 whatever their type.
    """
    # Where only memory is counted, the second piece is as the others: its parts lie beside the first one's.
    some = itertools.islice(pieces, 2) if detect_fake_mode((query,)) else pieces
    return _Dropped.apply(query, key, value, list(some), sum(piece.size for piece in pieces), p, scale)


def _multiply(one: torch.Tensor, other: torch.Tensor, scale: float) -> torch.Tensor:
    """One by other, batch by batch, times a number, without a pass of its own for that."""
    output = one.new_empty(len(one), one.shape[1], other.shape[2])
    return output.baddbmm_(one, other, beta=0, alpha=scale)


def _as_they_are() -> contextlib.AbstractContextManager[Any]:
    """No autocast; where there is none, nothing, which takes less time."""
    cast = torch.is_autocast_enabled("cpu")
    return torch.autocast("cpu", enabled=False) if cast else contextlib.nullcontext()


def _in_turn(signed: torch.Tensor, pieces: Iterable[Piece], heads: int) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Each piece with its part of a buffer as [rows x heads, queries, keys]."""
    start = 0
    for piece in pieces:
        end = start + heads * piece.size
        yield piece, signed[start:end].view(-1, piece.queries.length, piece.keys.length)
        start = end


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> torch.Tensor:  # pyrefly: ignore[bad-override]
        query, key, value, pieces, size, p, scale = given
        heads = query.shape[1]
        output = value.new_empty(len(query), heads, value.shape[2])
        signed = torch.empty(heads * size, device="cpu")
        with _as_they_are():
            for piece, flat in _in_turn(signed, pieces, heads):
                # Its scores, its probabilities, and those with their signs, in turn.
                flat.baddbmm_(
                    piece.queries.take(query), piece.keys.take(key).transpose(1, 2), beta=0, alpha=scale
                )
                if piece.mask is not None:
                    flat.view(piece.queries.rows, heads, *flat.shape[1:]).add_(piece.mask)
                torch.softmax(flat, -1, out=flat)
                kept = bernoulli_(torch.empty_like(flat), 1 - p).mul_(flat)
                flat.sub_(kept, alpha=2)
                piece.queries.put(output, _multiply(kept, piece.keys.take(value), 1 / (1 - p)))
        ctx.save_for_backward(query, key, value, signed)
        ctx.pieces, ctx.p, ctx.scale = pieces, p, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:  # pyrefly: ignore[bad-override]
        query, key, value, signed = ctx.saved_tensors
        of_query, of_key, of_value = found = [torch.empty_like(each) for each in (query, key, value)]
        with _as_they_are():
            for piece, flat in _in_turn(signed, ctx.pieces, query.shape[1]):
                own = piece.queries.take(gradients[0], blank=True)
                less = flat.clamp(max=0)  # minus what was kept of the probabilities
                piece.keys.put(of_value, _multiply(less.transpose(1, 2), own, -1 / (1 - ctx.p)))
                less *= _multiply(own, piece.keys.take(value).transpose(1, 2), 1 / (1 - ctx.p))
                # Minus the gradient of the scores: kept x its gradient - probability x that row's sum of it.
                less.addcmul_(flat.abs(), less.sum(-1, keepdim=True), value=-1)
                piece.queries.put(of_query, _multiply(less, piece.keys.take(key), -ctx.scale))
                piece.keys.put(of_key, _multiply(less.transpose(1, 2), piece.queries.take(query), -ctx.scale))
        return *found, None, None, None, None
