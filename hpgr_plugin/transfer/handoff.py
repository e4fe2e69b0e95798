"""What stage 1 hands to stage 2: the item table and the SEM weights, in one safetensors file."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT_VERSION = 1
_HEADER_KEY = "hpgr"
_TABLE = "item_table"
_SEM_PREFIX = "sem."


class HandoffError(ValueError):
    """A hand-over that does not fit; the message gives both sides."""


class Handoff(NamedTuple):
    """A loaded hand-over.

    Attributes:
        item_table: `[V, D]`.
        sem_state: state dict of the SEM, or None if stage 1 had none.
        header: format_version, num_items, embedding_dim, vocabulary_digest, gap_seconds, sem (the
            SEM's settings, or None) and extra.
    """

    item_table: Tensor
    sem_state: dict[str, Tensor] | None
    header: dict[str, Any]


def save_handoff(
    path: str | os.PathLike[str],
    *,
    item_table: Tensor,
    sem: nn.Module | None,
    vocabulary_digest: str,
    gap_seconds: int,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a hand-over; the file appears whole or not at all.

    Args:
        path: an existing file is replaced.
        item_table: `[V, D]`.
        sem: a SessionEnhancementModule, or None.
        vocabulary_digest: of the items that the table's rows stand for, in order.
        gap_seconds: of the sessions stage 1 was trained on.
        extra: anything JSON can hold.
    """
    if item_table.dim() != 2:
        raise ValueError(f"item_table must be [V, D], got {list(item_table.shape)}")
    header = {
        "format_version": FORMAT_VERSION,
        "num_items": item_table.shape[0],
        "embedding_dim": item_table.shape[1],
        "vocabulary_digest": vocabulary_digest,
        "gap_seconds": gap_seconds,
        "sem": None if sem is None else sem_settings(sem),
        "extra": extra or {},
    }
    tensors = {_TABLE: item_table}
    if sem is not None:
        tensors |= {_SEM_PREFIX + name: value for name, value in sem.state_dict().items()}
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        save_file(tensors, partial, metadata={_HEADER_KEY: json.dumps(header)})
        os.replace(partial, target)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def load_handoff(
    path: str | os.PathLike[str],
    *,
    num_items: int,
    embedding_dim: int,
    vocabulary_digest: str,
    gap_seconds: int | None = None,
) -> Handoff:
    """Read a hand-over and check that it is one for this model and these items.

    Args:
        num_items, embedding_dim, vocabulary_digest: what the caller has.
        gap_seconds: the caller's session gap; None does not compare it.

    Raises:
        FileNotFoundError: no such file.
        HandoffError: not a hand-over, another format version, vocabulary, size or gap. Nothing has
            been loaded then.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no hand-over at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = _read_header(path, file.metadata())
            expected = {
                "vocabulary_digest": vocabulary_digest,
                "num_items": num_items,
                "embedding_dim": embedding_dim,
            }
            if gap_seconds is not None:
                expected["gap_seconds"] = gap_seconds
            _compare(path, header, expected)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise HandoffError(f"{path} is not a safetensors file: {error}") from error
    table = tensors.pop(_TABLE, torch.empty(0))
    if list(table.shape) != [num_items, embedding_dim]:
        raise HandoffError(
            f"{path}: the header promises an item table [{num_items}, {embedding_dim}], "
            f"the file holds {list(table.shape)}"
        )
    sem_state = {name.removeprefix(_SEM_PREFIX): value for name, value in tensors.items()}
    return Handoff(table, sem_state if header["sem"] is not None else None, header)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header alone, see `Handoff`: for callers that learn the sizes from the file.

    Raises:
        FileNotFoundError: no such file.
        HandoffError: not a hand-over, or another format version.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no hand-over at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return _read_header(path, file.metadata())
    except SafetensorError as error:
        raise HandoffError(f"{path} is not a safetensors file: {error}") from error


def load_sem_state(sem: nn.Module, handoff: Handoff) -> None:
    """Put the SEM weights of a hand-over into `sem`, all of them or none.

    Raises:
        HandoffError: the hand-over has no SEM, or one of other settings or other weights.
    """
    if handoff.sem_state is None:
        raise HandoffError("the hand-over has no SEM weights, the model has a SEM")
    mine, theirs = sem_settings(sem), handoff.header["sem"]
    if mine != theirs:
        differing = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        both = ", ".join(f"{k}: {theirs.get(k)!r} there, {mine.get(k)!r} here" for k in differing)
        raise HandoffError(f"the SEM of the hand-over has other settings: {both}")
    there = {name: list(value.shape) for name, value in handoff.sem_state.items()}
    here = {name: list(value.shape) for name, value in sem.state_dict().items()}
    if there != here:  # load_state_dict would copy what fits before it complains
        differing = sorted(k for k in there.keys() | here.keys() if there.get(k) != here.get(k))
        both = ", ".join(f"{k}: {there.get(k)} there, {here.get(k)} here" for k in differing)
        raise HandoffError(f"the SEM of the hand-over has other weights: {both}")
    sem.load_state_dict(handoff.sem_state, strict=True)


def sem_settings(sem: nn.Module) -> dict[str, Any]:
    """The settings on which the meaning of SEM weights depends, by constructor argument."""
    names = (
        "embedding_dim",
        "num_heads",
        "num_layers",
        "gap_seconds",
        "pooling",
        "fusion",
        "causal",
        "max_session_length",
        "max_sessions",
    )
    return {name: getattr(sem, name) for name in names}


def _read_header(path: str | os.PathLike[str], metadata: dict[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(_HEADER_KEY)
    if text is None:
        raise HandoffError(f"{path} is a safetensors file but no hand-over: it has no header")
    header: dict[str, Any] = json.loads(text)
    _compare(path, header, {"format_version": FORMAT_VERSION})
    return header


def _compare(
    path: str | os.PathLike[str], header: dict[str, Any], expected: dict[str, Any]
) -> None:
    wrong = [
        f"{name} is {header.get(name)!r} there, {value!r} here"
        for name, value in expected.items()
        if header.get(name) != value
    ]
    if wrong:
        raise HandoffError(f"{path} does not fit: {'; '.join(wrong)}")
