"""The host's names that this adapter stands in for, put in place and taken back."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gin
import torch
from generative_recommenders.dlrm_v3.train import utils as train

from hpgr_plugin.hosts.contract import accepts
from hpgr_plugin.hosts.dlrm_v3.model import DlrmHSTU
from hpgr_plugin.hosts.dlrm_v3.pretrained import lr_ratio

_KeyedOptimizerWrapper: Any = train.KeyedOptimizerWrapper
_DistributedModelParallel: Any = train.DistributedModelParallel
_apply_optimizer_in_backward: Callable[..., None] = train.apply_optimizer_in_backward

_MODEL_PARAMETER = "make_model.model_cls"


class InheritedLrOptimizer(_KeyedOptimizerWrapper):
    """The host's dense optimizer, with a group of its own for every inherited learning rate."""

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        optim_factory: Callable[[Any], torch.optim.Optimizer],
        **others: Any,
    ) -> None:
        groups: dict[float, list[torch.Tensor]] = {}
        for parameter in params.values():
            groups.setdefault(lr_ratio(parameter), []).append(parameter)

        def with_groups(parameters: Any) -> torch.optim.Optimizer:
            if set(groups) <= {1.0}:
                return optim_factory(parameters)
            optimizer = optim_factory([{"params": group} for group in groups.values()])
            for ratio, group in zip(groups, optimizer.param_groups, strict=True):
                group["lr"] *= ratio
            return optimizer

        super().__init__(params, with_groups, **others)


class PretrainedModelParallel(_DistributedModelParallel):
    """Shards the model as the host does, then loads the hand-over into the shards.

    Before the trainer restores a checkpoint, so a checkpoint has the last word.
    """

    def __init__(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(module, *args, **kwargs)
        for part in self.modules():
            if isinstance(part, DlrmHSTU):
                part.load_pretrained()


@functools.wraps(_apply_optimizer_in_backward)
def apply_with_inherited_lr(
    optimizer_class: Any,
    params: Iterable[torch.nn.Parameter],
    optimizer_kwargs: Mapping[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    """The host's fused sparse optimizer, inherited tables with their smaller rate."""
    for parameter in params:
        settings = {**optimizer_kwargs, "lr": optimizer_kwargs["lr"] * lr_ratio(parameter)}
        _apply_optimizer_in_backward(optimizer_class, [parameter], settings, *args, **kwargs)


_REPLACEMENTS: dict[str, tuple[Any, Any]] = {
    "DlrmHSTU": (train.DlrmHSTU, DlrmHSTU),
    "KeyedOptimizerWrapper": (_KeyedOptimizerWrapper, InheritedLrOptimizer),
    "DistributedModelParallel": (_DistributedModelParallel, PretrainedModelParallel),
    "apply_optimizer_in_backward": (_apply_optimizer_in_backward, apply_with_inherited_lr),
}


def attach() -> None:
    """Let the host's trainer build HPGR's model. Doing it twice is doing it once.

    A host with the project's patches takes the model class as a gin parameter of `make_model`;
    unless the configuration names one already, it is bound here (`gin.clear_config` forgets it:
    attach again). In other hosts the name that `make_model` looks up is replaced.
    """
    for name, (_, replacement) in _REPLACEMENTS.items():
        if not (name == "DlrmHSTU" and _takes_model_class()):
            setattr(train, name, replacement)
    if _takes_model_class() and not _is_bound(_MODEL_PARAMETER):
        with gin.unlock_config():
            gin.parse_config(f"{_MODEL_PARAMETER} = @hpgr.DlrmHSTU")


def detach() -> None:
    """Give the host its names back; models built so far keep what they have."""
    for name, (original, _) in _REPLACEMENTS.items():
        setattr(train, name, original)
    if _takes_model_class() and _is_bound(_MODEL_PARAMETER):
        with gin.unlock_config():
            gin.bind_parameter(_MODEL_PARAMETER, None)


def replaced_names() -> list[str]:
    """The names of the host that are not its own at the moment."""
    return [
        f"{train.__name__}.{name}"
        for name, (original, _) in _REPLACEMENTS.items()
        if getattr(train, name) is not original
    ]


def _takes_model_class() -> bool:
    return accepts(train.make_model, "model_cls")


def _is_bound(parameter: str) -> bool:
    try:
        return gin.query_parameter(parameter) is not None
    except ValueError:
        return False
