"""The clean seams that the project's patch series adds to the host.

With the series applied an adapter uses these instead of replacing names in the host's modules;
without it every answer here is False. One entry a patch, see `patches/README.md`.
"""

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Literal, get_args

from hpgr_plugin.hosts.contract import HOST_PACKAGE, accepts

Seam = Literal[
    "research_cpu",  # 0001: train_fn and main.py without a GPU
    "encoders",  # 0002: encoder_utils.ENCODERS
    "input_preproc_cls",  # 0003: train_fn(input_preproc_cls=)
    "param_groups_fn",  # 0003: train_fn(param_groups_fn=), "lr_scale" in a group
    "model_cls",  # 0004: make_model(model_cls=)
    "gin_file",  # 0005: train_ranker --gin_file
    "dlrm_classes",  # 0006: DlrmHSTU.stu_layer_cls, positional_encoder_cls, ...
    "value_scale",  # 0007: STULayer.forward(value_scale=), STUStack.forward(value_scale=)
    "lr_scale",  # 0008: make_optimizer_and_shard honours a parameter's lr_scale, and calls
    # a module's after_sharding()
    "ranking_cpu",  # 0009: train_ranker and U.setup without a GPU
]


def host_has_seam(name: Seam) -> bool:
    """Whether the host on the path has the seam `name`.

    Raises:
        ValueError: no such seam.
    """
    if name not in get_args(Seam):
        raise ValueError(f"name must be one of {get_args(Seam)}, got {name!r}")
    module, present = _PROBES[name]
    return present(importlib.import_module(f"{HOST_PACKAGE}.{module}"))


def _research_cpu(train: ModuleType) -> bool:
    # The patch asks for gloo in setup(); the host as it stands knows "nccl" alone.
    return "gloo" in train.setup.__code__.co_consts


def _ranking_cpu(utils: ModuleType) -> bool:
    return "gloo" in utils.setup.__code__.co_consts


def _gin_file(train_ranker: ModuleType) -> bool:
    return "--gin_file" in train_ranker.get_args.__code__.co_consts


_PROBES: Mapping[Seam, tuple[str, Callable[[ModuleType], bool]]] = {
    "research_cpu": ("research.trainer.train", _research_cpu),
    "encoders": (
        "research.modeling.sequential.encoder_utils",
        lambda module: hasattr(module, "ENCODERS"),
    ),
    "input_preproc_cls": (
        "research.trainer.train",
        lambda module: accepts(module.train_fn, "input_preproc_cls"),
    ),
    "param_groups_fn": (
        "research.trainer.train",
        lambda module: accepts(module.train_fn, "param_groups_fn"),
    ),
    "model_cls": ("dlrm_v3.train.utils", lambda module: accepts(module.make_model, "model_cls")),
    "gin_file": ("dlrm_v3.train.train_ranker", _gin_file),
    "dlrm_classes": (
        "modules.dlrm_hstu",
        lambda module: hasattr(module.DlrmHSTU, "stu_layer_cls"),
    ),
    "value_scale": (
        "modules.stu",
        lambda module: accepts(module.STULayer.forward, "value_scale"),
    ),
    "lr_scale": ("dlrm_v3.train.utils", lambda module: hasattr(module, "scaled_groups")),
    "ranking_cpu": ("dlrm_v3.train.utils", _ranking_cpu),
}
