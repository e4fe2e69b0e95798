"""The folder that is served: weights, configuration and vocabulary, nothing else is needed.

model.safetensors   weights, and the tensors that the model was built with
model.gin           the configuration in force when it was built
vocabulary.npz      item ids, actions, users and their features
manifest.json       format, scope, arguments, where it comes from, checksums
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from hpgr_plugin.config.registry import register
from hpgr_plugin.config.stored import build_all
from hpgr_plugin.data.requests import RequestSettings
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.files import atomic_write, crc32
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.serving.vocabulary import Vocabulary

FORMAT_VERSION = 1
MANIFEST, WEIGHTS, CONFIG, VOCABULARY = (
    "manifest.json",
    "model.safetensors",
    "model.gin",
    "vocabulary.npz",
)
_WEIGHT, _ARGUMENT = "weight/", "argument/"


class FolderError(HpgrError):
    """A folder that holds no model to serve, or a damaged one."""


@dataclass(frozen=True)
class ServedModel:
    """What a folder holds.

    Attributes:
        model: on the CPU, in evaluation mode.
        settings: of the training's requests.
        vocabulary: of the log.
        manifest: format, scope, version of this package, and what the exporter wrote beside.
    """

    model: HSTURanker
    settings: RequestSettings
    vocabulary: Vocabulary
    manifest: dict[str, Any]


def write_folder(
    folder: Path,
    *,
    model: HSTURanker,
    config: str,
    scope: str,
    arguments: dict[str, Any],
    vocabulary: Vocabulary,
    notes: dict[str, Any],
) -> None:
    """Write a folder that `read_folder` makes the same model of.

    Args:
        folder: made if it is not there.
        model: with the weights to serve.
        config: gin text that configures it.
        scope: gin scope in which it was built, "" for none.
        arguments: that its constructor got beside; tensors, dicts of tensors, and plain values.
        vocabulary: of the log.
        notes: plain values for the manifest.
    """
    tensors, plain = _split(arguments)
    tensors = {_ARGUMENT + name: value for name, value in tensors.items()}
    tensors |= {_WEIGHT + name: value for name, value in model.state_dict().items()}
    with atomic_write(folder / WEIGHTS) as path:
        # Not by save_file, whose files only their owner may read.
        path.write_bytes(save({n: t.detach().cpu().clone() for n, t in tensors.items()}))
    with atomic_write(folder / CONFIG) as path:
        path.write_text(config)
    with atomic_write(folder / VOCABULARY) as path, path.open("wb") as file:
        np.savez(file, **vocabulary.arrays())  # type: ignore[arg-type]
    manifest = {
        "format_version": FORMAT_VERSION,
        "scope": scope,
        "arguments": plain,
        "sem_causal": None if model.sem is None else model.sem.causal,
        "checksums": {name: crc32(folder / name) for name in (WEIGHTS, CONFIG, VOCABULARY)},
        **notes,
    }
    with atomic_write(folder / MANIFEST) as path:  # last: a folder without it is not whole
        path.write_text(json.dumps(manifest, indent=1))


def read_folder(folder: Path) -> ServedModel:
    """Build the model of a folder and load its weights.

    Raises:
        FolderError: no such folder, a damaged file, or another format version.
    """
    manifest = _manifest(folder)
    for name, expected in manifest["checksums"].items():
        if not (folder / name).is_file() or crc32(folder / name) != expected:
            raise FolderError(f"{folder / name} is missing or damaged: export the model again")
    try:
        tensors = load_file(folder / WEIGHTS)
        with np.load(folder / VOCABULARY, allow_pickle=False) as arrays:
            vocabulary = Vocabulary.from_arrays(dict(arrays))
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise FolderError(f"{folder} cannot be read: {error}") from error
    register("components", "data", "embedded")
    arguments = _joined(manifest["arguments"], _below(_ARGUMENT, tensors))
    made = build_all(
        (folder / CONFIG).read_text(),
        manifest["scope"],
        {"HSTURanker": arguments | {"pretrained": None}, "RequestSettings": {}},
    )
    model = made["HSTURanker"]
    if model.sem is not None:
        model.sem.causal = manifest["sem_causal"]
    try:
        model.load_state_dict(_below(_WEIGHT, tensors))
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise FolderError(f"{folder} is of another version of the model: {text}") from error
    return ServedModel(model.eval(), made["RequestSettings"], vocabulary, manifest)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FolderError(
            f"{folder} holds no model to serve (no {MANIFEST}): write one with "
            "python -m hpgr_plugin.serving.export"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version, _ = manifest["format_version"], manifest["checksums"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} is damaged: {error}") from error
    if version != FORMAT_VERSION:
        raise FolderError(f"{path} has format version {version}, this code reads {FORMAT_VERSION}")
    return manifest


def _split(arguments: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by name ("a" or "a/b" inside a dict), and the other arguments."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()):
            tensors |= {f"{name}/{key}": inner for key, inner in value.items()}
        else:
            plain[name] = value
    return tensors, plain


def _joined(plain: dict[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The inverse of `_split`."""
    arguments = dict(plain)
    for name, value in tensors.items():
        outer, slash, inner = name.partition("/")
        if slash:
            arguments.setdefault(outer, {})[inner] = value
        else:
            arguments[name] = value
    return arguments


def _below(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
