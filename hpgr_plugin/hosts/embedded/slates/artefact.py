"""Files of the slate stages: the tokens of the items, and trained slate models, in safetensors."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.components.slates import decoder as decoders
from hpgr_plugin.components.slates import tokenizer as tokenizers
from hpgr_plugin.components.slates.semantic_ids import SemanticIds
from hpgr_plugin.components.slates.tokenizer import ItemTokenizer
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.files import atomic_write
from hpgr_plugin.hosts.embedded.slates.model import SlateModel
from hpgr_plugin.transfer.handoff import sem_settings

FORMAT_VERSION = 1
_KEY, _CHECKSUM = "hpgr_slates", "hpgr_checksum"


class ArtefactError(HpgrError):
    """A file of the slate stages that is damaged or does not fit."""


class Tokens(NamedTuple):
    """The tokens of all items.

    Attributes:
        ids: semantic ids of the items, by code.
        vectors: `[V, E]`, what the tokenizer read.
        tokenizer: for items that come later.
    """

    ids: SemanticIds
    vectors: Tensor
    tokenizer: ItemTokenizer

    def with_items(self, vectors: Tensor) -> SemanticIds:
        """The ids with new items `[V', E]` behind the others, by the tokenizer as it is."""
        return self.ids.with_items(self.tokenizer.digits(vectors))


def save_tokens(path: Path, tokens: Tokens, *, vocabulary_digest: str) -> None:
    """Write tokens."""
    ids, tokenizer = tokens.ids, tokens.tokenizer
    tensors = {"digits": ids.codes[:, :-1], "vectors": tokens.vectors}
    tensors |= {f"tokenizer.{name}": value for name, value in tokenizer.state_dict().items()}
    header = {
        "kind": "tokens",
        "vocabulary_digest": vocabulary_digest,
        "class": type(tokenizer).__name__,
        "arguments": tokenizer.settings,
        "index_size": ids.index_size,
    }
    _write(path, tensors, header)


def load_tokens(path: Path, *, vocabulary_digest: str) -> Tokens:
    """Read tokens.

    Raises:
        FileNotFoundError: no such file.
        ArtefactError: it is damaged, of another kind, or of other items.
    """
    tensors, header = _read(path, "tokens")
    if header["vocabulary_digest"] != vocabulary_digest:
        raise ArtefactError(f"{path} holds tokens of other items than those of the data")
    tokenizer: ItemTokenizer = getattr(tokenizers, header["class"])(**header["arguments"])
    tokenizer.load_state_dict(_below("tokenizer.", tensors))
    ids = SemanticIds(
        tensors["digits"],
        codebook_size=tokenizer.codebook_size,
        index_size=header["index_size"],
    )
    return Tokens(ids, tensors["vectors"], tokenizer.eval())


def save_model(path: Path, model: SlateModel, *, item_ids: list[Any]) -> None:
    """Write a trained model with all that building it again takes.

    Args:
        path: an existing file is replaced.
        model: trained.
        item_ids: the source's id of every item.
    """
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    header: dict[str, Any] = {"kind": "model", "settings": model.settings, "item_ids": item_ids}
    header["sem"] = None if model.sem is None else sem_settings(model.sem)
    if (decoder := model.decoder) is not None:
        tensors["digits"] = decoder.ids.codes[:, :-1]
        header["decoder"] = {
            "class": type(decoder).__name__,
            "arguments": decoder.settings,
            "codebook_size": decoder.ids.codebook_size,
            "index_size": decoder.ids.index_size,
        }
    _write(path, tensors, header)


def load_model(path: Path) -> tuple[SlateModel, list[Any]]:
    """Read a trained model, in evaluation mode, and the source's item ids.

    Raises:
        FileNotFoundError: no such file.
        ArtefactError: it is damaged or of another kind.
    """
    tensors, header = _read(path, "model")
    arguments: dict[str, Any] = {}
    if (decoder := header.get("decoder")) is not None:
        arguments["decoder"] = getattr(decoders, decoder["class"])
        arguments["decoder_arguments"] = decoder["arguments"]
        sizes = {name: decoder[name] for name in ("codebook_size", "index_size")}
        arguments["ids"] = SemanticIds(tensors["digits"], **sizes)
    if header["sem"] is not None:
        arguments["sem"] = SessionEnhancementModule(**header["sem"])
    model = SlateModel(**header["settings"], **arguments)
    model.load_state_dict(_below("model.", tensors))
    return model.eval(), header["item_ids"]


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps({"format_version": FORMAT_VERSION, **header})
    content = save(tensors, {_KEY: text, _CHECKSUM: str(_crc(tensors, text))})
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def _read(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no {kind} of a slate stage at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header: dict[str, Any] = json.loads(metadata[_KEY])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtefactError(f"{path} is damaged or of no slate stage: {error}") from error
    if metadata.get(_CHECKSUM) != str(_crc(tensors, metadata[_KEY])):
        raise ArtefactError(f"{path} is damaged: it differs from its checksum")
    found = header.get("format_version"), header.get("kind")
    if found != (FORMAT_VERSION, kind):
        raise ArtefactError(f"{path} takes {FORMAT_VERSION, kind} as version and kind, got {found}")
    return tensors, header


def _crc(tensors: dict[str, Tensor], text: str) -> int:
    """CRC-32 of the header and of all tensors in the order of their names."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return crc
