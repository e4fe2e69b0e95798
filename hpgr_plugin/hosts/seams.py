"""The seams that the project's patch series adds to the host, see `patches/README.md`.

With the series applied, an adapter uses them instead of replacing names in the host's modules.
"""

import contextlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import gin

from hpgr_plugin.hosts.contract import accepts
from hpgr_plugin.hosts.requirements import HOST_PACKAGE


def _takes(parameter: str) -> Callable[[Any], bool]:
    return lambda function: accepts(function, parameter)


def _contains(text: str) -> Callable[[Any], bool]:
    return lambda function: text in function.__code__.co_consts


def _has(name: str) -> Callable[[Any], bool]:
    return lambda owner: hasattr(owner, name)


_RETRIEVAL, _RANKING = "research.trainer.train", "dlrm_v3.train.utils"
# Seam -> a name of the host, and what is true of it only with the patch of that number.
_SEAMS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "research_cpu": (f"{_RETRIEVAL}:setup", _contains("gloo")),  # 0001
    "encoders": ("research.modeling.sequential.encoder_utils:", _has("ENCODERS")),  # 0002
    "input_preproc_cls": (f"{_RETRIEVAL}:train_fn", _takes("input_preproc_cls")),  # 0003
    "param_groups_fn": (f"{_RETRIEVAL}:train_fn", _takes("param_groups_fn")),  # 0003
    "model_cls": (f"{_RANKING}:make_model", _takes("model_cls")),  # 0004
    "gin_file": ("dlrm_v3.train.train_ranker:get_args", _contains("--gin_file")),  # 0005
    "dlrm_classes": ("modules.dlrm_hstu:DlrmHSTU", _has("stu_layer_cls")),  # 0006
    "value_scale": ("modules.stu:STULayer.forward", _takes("value_scale")),  # 0007
    "lr_scale": (f"{_RANKING}:", _has("scaled_groups")),  # 0008, also `after_sharding`
    "ranking_cpu": (f"{_RANKING}:setup", _contains("gloo")),  # 0009
}


def host_has_seam(name: str) -> bool:
    """Whether the host on the path has the seam `name`.

    Raises:
        ValueError: There is no such seam.
    """
    if name not in _SEAMS:
        raise ValueError(f"name must be one of {sorted(_SEAMS)}, got {name!r}")
    place, is_there = _SEAMS[name]
    return is_there(pkgutil.resolve_name(f"{HOST_PACKAGE}.{place}"))


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Inside, the attributes of `owner` named by `values` have other values."""
    before = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def bound_value(parameter: str) -> Any:
    """The value that gin's configuration gives `parameter` ("configurable.name"), or None."""
    try:
        return gin.query_parameter(parameter)
    except ValueError:
        return None


def is_bound(parameter: str) -> bool:
    """Whether gin's configuration gives `parameter` a value."""
    return bound_value(parameter) is not None


def bind(parameter: str, value: Any) -> None:
    """Bind `parameter` in gin's configuration, also after that was locked; None unbinds it."""
    with gin.unlock_config():
        gin.bind_parameter(parameter, value)
