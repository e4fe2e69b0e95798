"""The hand-over from stage 1 to stage 2: item table, SEM and item features, in safetensors."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.components.sharded_table import RowShardedTable
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.files import atomic_write

FORMAT_VERSION = 1
_ROWS_PER_BLOCK = 1 << 16
_HEADER_KEY = "hpgr"
_CHECKSUM_KEY = "hpgr_checksum"  # of the header's text
_TABLE = "item_table"
_ITEM_IDS = "item_ids"
_SEM_PREFIX = "sem."
_FEATURE_PREFIX = "item_features."
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.bool: "BOOL",
}  # as safetensors names them
_HEADER_TYPES: dict[str, type | tuple[type, ...]] = {
    "num_items": int,
    "embedding_dim": int,
    "vocabulary_digest": str,
    "gap_seconds": int,
    "sem": (dict, type(None)),
    "extra": dict,
    "checksums": dict,
}


class HandoffError(HpgrError):
    """A hand-over that is damaged or does not fit; the message names the file and both sides."""


class Handoff(NamedTuple):
    """A loaded hand-over.

    Attributes:
        item_table: `[V, D]`.
        sem_state: state dict of the SEM, or None if stage 1 had none.
        feature_state: state dict of the item features, or None if stage 1 had none.
        header: format_version, num_items, embedding_dim, vocabulary_digest, gap_seconds, sem (the
            SEM's settings, or None), extra and checksums (CRC-32 by tensor).
    """

    item_table: Tensor
    sem_state: dict[str, Tensor] | None
    feature_state: dict[str, Tensor] | None
    header: dict[str, Any]


def save_handoff(
    path: str | os.PathLike[str],
    *,
    item_table: Tensor,
    sem: SessionEnhancementModule | None,
    vocabulary_digest: str,
    gap_seconds: int,
    item_features: nn.Module | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a hand-over; an interrupted call leaves the old file, or none.

    Args:
        path: an existing file is replaced.
        item_table: `[V, D]`.
        sem: the session enhancement module of stage 1, or None.
        vocabulary_digest: digest of the items that the rows of the table belong to, in order.
        gap_seconds: the longest pause inside a session in stage 1, seconds.
        item_features: the embeddings of item features of stage 1, or None.
        extra: anything JSON can hold.

    Raises:
        ValueError: a table that is not `[V, D]`, or a SEM whose `causal` is undecided.
    """
    if item_table.dim() != 2:
        raise ValueError(f"item_table must be [V, D], got {list(item_table.shape)}")
    tensors = {
        _TABLE: _for_file(item_table),
        **_state(_SEM_PREFIX, sem),
        **_state(_FEATURE_PREFIX, item_features),
    }
    header = _header(
        shape=tuple(item_table.shape),
        sem=sem,
        vocabulary_digest=vocabulary_digest,
        gap_seconds=gap_seconds,
        extra=extra,
    )
    checksums = {name: _checksum(value) for name, value in tensors.items()}
    with atomic_write(Path(path)) as partial:  # save_file would ignore the umask
        partial.write_bytes(save(tensors, _metadata(header, checksums)))


def save_handoff_in_blocks(
    path: str | os.PathLike[str],
    *,
    blocks: Iterable[Tensor],
    shape: tuple[int, int],
    sem: SessionEnhancementModule | None,
    vocabulary_digest: str,
    gap_seconds: int,
    extra: dict[str, Any] | None = None,
    item_ids: Tensor | None = None,
) -> None:
    """`save_handoff` of a table that is never in memory as a whole.

    Args:
        path: an existing file is replaced.
        blocks: float32 `[., D]` each, the rows of the table in order.
        shape: V and D.
        sem, vocabulary_digest, gap_seconds, extra: see `save_handoff`.
        item_ids: int64 `[V]`, what a reader finds as `extra["item_ids"]`: as text, the ids of many
            items would be more than the header of a safetensors file may hold.

    Raises:
        ValueError: blocks that do not make up a float32 table of this shape.
    """
    others = _state(_SEM_PREFIX, sem)
    if item_ids is not None:
        others[_ITEM_IDS] = _for_file(item_ids)
    header = _header(
        shape=shape,
        sem=sem,
        vocabulary_digest=vocabulary_digest,
        gap_seconds=gap_seconds,
        extra=extra,
    )
    checksums = {name: _checksum(value) for name, value in others.items()}
    # The table's checksum comes before the table: room for the longest is left.
    longest = _file_header(shape, others, _metadata(header, {_TABLE: 2**32 - 1} | checksums))
    room = -(-(len(longest) + len(str(2**32))) // 8) * 8
    with atomic_write(Path(path)) as partial, partial.open("wb") as file:
        file.write(room.to_bytes(8, "little") + b" " * room)
        rows = checksum = 0
        for block in blocks:
            if block.dtype != torch.float32 or block.shape[1:] != shape[1:]:
                raise ValueError(f"blocks must be float32 [., {shape[1]}], got {block.dtype}")
            data = _bytes(_for_file(block))
            checksum, rows = zlib.crc32(data, checksum), rows + len(block)
            file.write(data)
        if rows != shape[0]:
            raise ValueError(f"blocks must have {shape[0]} rows together, got {rows}")
        for value in others.values():
            file.write(_bytes(value))
        metadata = _metadata(header, {_TABLE: checksum} | checksums)
        file.seek(8)
        file.write(_file_header(shape, others, metadata).ljust(room))


def load_handoff(
    path: str | os.PathLike[str],
    *,
    num_items: int,
    embedding_dim: int,
    vocabulary_digest: str,
    gap_seconds: int | None = None,
) -> Handoff:
    """Read a hand-over and check that it is whole and belongs to this model and these items.

    Args:
        path: the file that `save_handoff` wrote.
        num_items: V of the caller.
        embedding_dim: D of the caller.
        vocabulary_digest: digest of the caller's items.
        gap_seconds: the caller's session gap; None does not compare it.

    Raises:
        FileNotFoundError: no such file.
        HandoffError: another format version, vocabulary, size or gap; a file that is damaged or no
            hand-over; values that are not finite.
    """
    expected = {
        "vocabulary_digest": vocabulary_digest,
        "num_items": num_items,
        "embedding_dim": embedding_dim,
    } | ({} if gap_seconds is None else {"gap_seconds": gap_seconds})
    with _open(path) as file:
        header = _fitting_header(path, file, expected)
        tensors = {name: file.get_tensor(name) for name in _names(path, file, header)}
    _check_tensors(path, tensors, header)
    if (item_ids := tensors.pop(_ITEM_IDS, None)) is not None:
        header["extra"][_ITEM_IDS] = item_ids.tolist()
    sem_state = _below(_SEM_PREFIX, tensors) if header["sem"] is not None else None
    return Handoff(tensors[_TABLE], sem_state, _below(_FEATURE_PREFIX, tensors) or None, header)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Only the header, see `Handoff`: for callers that learn the sizes from the file.

    Raises:
        FileNotFoundError: no such file.
        HandoffError: a file that is damaged or no hand-over, or another format version.
    """
    with _open(path) as file:
        return _read_header(path, file.metadata())


def load_sem_state(sem: SessionEnhancementModule, handoff: Handoff) -> None:
    """Load the SEM weights of a hand-over into `sem`, all of them or none.

    A `sem` whose `causal` is undecided takes the form of the hand-over.

    Raises:
        HandoffError: the hand-over has no SEM, or one of other settings or other weights.
    """
    if handoff.sem_state is None:
        raise HandoffError("the hand-over has no SEM weights, but the model has a SEM")
    there, here = handoff.header["sem"], sem_settings(sem)
    if sem.causal is None:
        here["causal"] = there.get("causal")
    _compare("the SEM of the hand-over has other settings", there, here)
    # load_state_dict would copy what fits before it complains about the rest.
    shapes_there, shapes_here = _shapes(handoff.sem_state), _shapes(sem.state_dict())
    _compare("the SEM of the hand-over has other weights", shapes_there, shapes_here)
    sem.load_state_dict(handoff.sem_state, strict=True)
    sem.causal = here["causal"]


def load_feature_state(item_features: nn.Module, handoff: Handoff) -> None:
    """Load the item features of a hand-over, all of them or none.

    Raises:
        HandoffError: the hand-over has none, or other ones.
    """
    if handoff.feature_state is None:
        raise HandoffError("the hand-over has no item features, but the model has")
    shapes = _shapes(handoff.feature_state), _shapes(item_features.state_dict())
    _compare("the hand-over has other item features", *shapes)
    item_features.load_state_dict(handoff.feature_state, strict=True)


def inherit(
    path: str | os.PathLike[str],
    item_table: nn.Embedding | RowShardedTable,
    sem: SessionEnhancementModule | None,
    vocabulary_digest: str,
    item_features: nn.Module | None = None,
) -> tuple[str, ...]:
    """Take over the item table and, where both sides have them, SEM and item features.

    A sharded table takes its rows from blocks: every process reads the whole file, so that it finds
    what is damaged, but has at most 65,536 rows of the other processes in memory.

    Returns:
        The names of what was taken: "item_table", "sem", "item_features".

    Raises:
        FileNotFoundError: no such file.
        HandoffError: see `load_handoff`, `load_sem_state` and `load_feature_state`.
    """
    sizes: dict[str, Any] = {
        "num_items": item_table.num_embeddings,
        "embedding_dim": item_table.embedding_dim,
        "vocabulary_digest": vocabulary_digest,
    }
    if isinstance(item_table, RowShardedTable):
        handoff = _load_into_shards(path, item_table, sizes)
    else:
        handoff = load_handoff(path, **sizes)
        with torch.no_grad():
            item_table.weight.copy_(handoff.item_table)
    inherited: tuple[str, ...] = ("item_table",)
    if sem is not None and handoff.sem_state is not None:
        load_sem_state(sem, handoff)
        inherited += ("sem",)
    if item_features is not None and handoff.feature_state is not None:
        load_feature_state(item_features, handoff)
        inherited += ("item_features",)
    return inherited


def _load_into_shards(
    path: str | os.PathLike[str], table: RowShardedTable, sizes: dict[str, Any]
) -> Handoff:
    """Fill this process's part of a table; what is returned has no rows, and no item ids."""
    with _open(path) as file:
        header = _fitting_header(path, file, sizes)
        names = [name for name in _names(path, file, header) if name not in (_TABLE, _ITEM_IDS)]
        tensors = {name: file.get_tensor(name) for name in names}
        rows, num_items = file.get_slice(_TABLE), table.num_embeddings
        starts = range(0, num_items, _ROWS_PER_BLOCK)
        blocks = (rows[at : min(at + _ROWS_PER_BLOCK, num_items)] for at in starts)
        # Strict: the check comes after the last block.
        for start, block in zip(starts, _checked(path, _TABLE, blocks, header), strict=True):
            table.take_rows(start, block)
    _check_tensors(path, tensors, header)
    no_rows = torch.empty(0, table.embedding_dim)
    sem_state = _below(_SEM_PREFIX, tensors) if header["sem"] is not None else None
    return Handoff(no_rows, sem_state, _below(_FEATURE_PREFIX, tensors) or None, header)


def sem_settings(sem: SessionEnhancementModule) -> dict[str, Any]:
    """The constructor arguments that the meaning of SEM weights depends on."""
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
    # Of those below only what is on is named: older hand-overs do not have them.
    options = {name: True for name in ("own_session", "session_tokens") if getattr(sem, name)}
    return {name: getattr(sem, name) for name in names} | options


def _header(
    *,
    shape: tuple[int, ...],
    sem: SessionEnhancementModule | None,
    vocabulary_digest: str,
    gap_seconds: int,
    extra: dict[str, Any] | None,
) -> dict[str, Any]:
    """The header without checksums."""
    if sem is not None and sem.causal is None:
        raise ValueError("sem.causal is undecided: a hand-over needs the form that was trained")
    return {
        "format_version": FORMAT_VERSION,
        "num_items": shape[0],
        "embedding_dim": shape[1],
        "vocabulary_digest": vocabulary_digest,
        "gap_seconds": gap_seconds,
        "sem": None if sem is None else sem_settings(sem),
        "extra": extra or {},
    }


def _metadata(header: Mapping[str, Any], checksums: Mapping[str, int]) -> dict[str, str]:
    text = json.dumps({**header, "checksums": checksums})
    return {_HEADER_KEY: text, _CHECKSUM_KEY: str(zlib.crc32(text.encode()))}


def _file_header(
    shape: tuple[int, int], others: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> bytes:
    """The header of a safetensors file: a float32 table of this shape, then the other tensors."""
    end = 4 * shape[0] * shape[1]
    entries: dict[str, Any] = {"__metadata__": metadata}
    entries[_TABLE] = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    for name, value in others.items():
        start, end = end, end + value.nbytes
        kind = _DTYPES[value.dtype]
        entries[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [start, end]}
    return json.dumps(entries).encode()


def _state(prefix: str, module: nn.Module | None) -> dict[str, Tensor]:
    """The state of a module, every name behind the prefix; nothing for None."""
    state = {} if module is None else module.state_dict()
    return {prefix + name: _for_file(value) for name, value in state.items()}


def _for_file(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no hand-over at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise HandoffError(f"{path} is damaged or not a safetensors file: {error}") from error


def _read_header(path: str | os.PathLike[str], metadata: Mapping[str, str] | None) -> Any:
    text = (metadata or {}).get(_HEADER_KEY)
    if text is None:
        raise HandoffError(f"{path} is a safetensors file but no hand-over: it has no header")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise HandoffError(f"{path} is damaged: its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise HandoffError(f"{path} is damaged: its header is a {type(header).__name__}")
    version = {"format_version": header.get("format_version")}
    _compare(f"{path} does not fit", version, {"format_version": FORMAT_VERSION})
    for name, kind in _HEADER_TYPES.items():
        if name not in header:
            raise HandoffError(f"{path} is damaged: its header has no {name}")
        if not isinstance(header[name], kind) or isinstance(header[name], bool):
            raise HandoffError(f"{path} is damaged: its header has {name} = {header[name]!r}")
    if (metadata or {}).get(_CHECKSUM_KEY) != str(zlib.crc32(text.encode())):
        raise HandoffError(f"{path} is damaged: its header differs from its checksum")
    return header


def _fitting_header(
    path: str | os.PathLike[str], file: Any, expected: Mapping[str, Any]
) -> dict[str, Any]:
    """The header of an open file, after a comparison with the caller's sizes."""
    header: dict[str, Any] = _read_header(path, file.metadata())
    _compare(f"{path} does not fit", {name: header[name] for name in expected}, expected)
    return header


def _names(path: str | os.PathLike[str], file: Any, header: Mapping[str, Any]) -> list[str]:
    """The tensors of an open file, after a comparison with what its header promises."""
    names = list(file.keys())
    promised = [header["num_items"], header["embedding_dim"]]
    found = list(file.get_slice(_TABLE).get_shape()) if _TABLE in names else None
    if found != promised:
        raise HandoffError(f"{path}: the header promises an item table {promised}, found {found}")
    if missing := sorted(header["checksums"].keys() ^ set(names)):
        raise HandoffError(f"{path} is damaged: header and file disagree on tensors {missing}")
    return names


def _check_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    for name, value in tensors.items():
        for _ in _checked(path, name, [value], header):
            pass


def _checked(
    path: str | os.PathLike[str], name: str, blocks: Iterable[Tensor], header: Mapping[str, Any]
) -> Iterator[Tensor]:
    """The blocks of a tensor, in order; raises after the last one if any is damaged."""
    checksum, finite = 0, True
    for block in blocks:
        checksum = zlib.crc32(_bytes(block), checksum)
        finite = finite and bool(torch.isfinite(block).all())
        yield block
    if header["checksums"][name] != checksum:
        raise HandoffError(f"{path} is damaged: tensor {name!r} differs from its checksum")
    if not finite:
        raise HandoffError(f"{path}: tensor {name!r} holds values that are not finite")


def _checksum(value: Tensor) -> int:
    """CRC-32 of the tensor's bytes."""
    return zlib.crc32(_bytes(value))


def _bytes(value: Tensor) -> memoryview:
    return value.reshape(-1).view(torch.uint8).numpy().data


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    found = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}


def _shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def _compare(what: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    wrong = "; ".join(
        f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    )
    if wrong:
        raise HandoffError(f"{what}: {wrong}")
