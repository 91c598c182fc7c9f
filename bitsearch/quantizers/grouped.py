"""Matrices cut into groups of input columns, in pieces that fit the processor's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_CHUNK_CPU, _CHUNK_CUDA = 1 << 17, 1 << 25

Search = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def by_group(
    weight: Tensor, importance: Tensor | None, size: int, search: Search
) -> tuple[Tensor, ...]:
    """Run a search over every group, and put its results together.

    Args:
        weight: (out, in), any float dtype.
        importance: (in,) weights of the squared error, None for equal ones. Groups
            that no input reaches are weighted equally.
        size: columns of a group; the last group of a row may be shorter.
        search: (rows, groups, size) weights and (groups, size) importance of mean 1
            to codes of the weights' shape and any tensors of shape (rows, groups).

    Returns:
        (out, in) codes, and the others as (out, groups).
    """
    rows, columns = weight.shape
    weight = weight.float()
    h = torch.ones(columns) if importance is None else importance.float()
    h = h.to(weight.device)
    full = columns - columns % size
    found = []
    if full:
        shape = (rows, full // size, size)
        found.append(
            _in_chunks(weight[:, :full].reshape(shape), h[:full].reshape(shape[1:]), search)
        )
    if columns % size:
        found.append(_in_chunks(weight[:, None, full:], h[None, full:], search))
    codes = torch.cat([part[0].flatten(1) for part in found], dim=1)
    return codes, *(torch.cat(parts, dim=1) for parts in list(zip(*found, strict=True))[1:])


def _in_chunks(weight: Tensor, h: Tensor, search: Search) -> tuple[Tensor, ...]:
    h = torch.where(h.sum(-1, keepdim=True) > 0, h, torch.ones_like(h))
    h = h / h.mean(-1, keepdim=True)
    chunk = _CHUNK_CUDA if weight.is_cuda else _CHUNK_CPU
    step = max(1, chunk // (weight.shape[1] * weight.shape[2]))
    parts = [search(rows, h) for rows in weight.split(step)]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def spread(grouped: Tensor, size: int, columns: int) -> Tensor:
    """(out, groups) -> (out, columns): every group's entry at each of its columns."""
    return grouped.repeat_interleave(size, dim=1)[:, :columns]
