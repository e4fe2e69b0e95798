"""The host's names that this adapter stands in for, put in place and taken back."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import gin
import torch
from generative_recommenders.dlrm_v3.train import utils as train

from hpgr_plugin.hosts.dlrm_v3.model import DlrmHSTU
from hpgr_plugin.hosts.dlrm_v3.pretrained import lr_scale
from hpgr_plugin.hosts.seams import Seam, host_has_seam

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
            groups.setdefault(lr_scale(parameter), []).append(parameter)

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

    # Whoever asks, as the contract does, sees the parameters of what it stands in for.
    __signature__ = inspect.signature(_DistributedModelParallel)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for part in self.modules():
            if isinstance(part, DlrmHSTU):
                part.after_sharding()


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
        settings = {**optimizer_kwargs, "lr": optimizer_kwargs["lr"] * lr_scale(parameter)}
        _apply_optimizer_in_backward(optimizer_class, [parameter], settings, *args, **kwargs)


# Name in the host's `dlrm_v3.train.utils`: what stands in for it, and the seam of a patched host
# that makes that needless.
_REPLACEMENTS: dict[str, tuple[Any, Seam]] = {
    "DlrmHSTU": (DlrmHSTU, "model_cls"),
    "KeyedOptimizerWrapper": (InheritedLrOptimizer, "lr_scale"),
    "DistributedModelParallel": (PretrainedModelParallel, "lr_scale"),
    "apply_optimizer_in_backward": (apply_with_inherited_lr, "lr_scale"),
}
_ORIGINALS: dict[str, Any] = {name: getattr(train, name) for name in _REPLACEMENTS}


def attach() -> None:
    """Let the host's trainer build HPGR's model. Doing it twice is doing it once.

    A host with the project's patches takes the model class as a gin parameter of `make_model`;
    unless the configuration names one already, it is bound here (`gin.clear_config` forgets it:
    attach again). In other hosts the names that its trainer looks up are replaced.
    """
    for name, (replacement, seam) in _REPLACEMENTS.items():
        if not host_has_seam(seam):
            setattr(train, name, replacement)
    if host_has_seam("model_cls") and not _is_bound(_MODEL_PARAMETER):
        with gin.unlock_config():
            gin.parse_config(f"{_MODEL_PARAMETER} = @hpgr.DlrmHSTU")


def detach() -> None:
    """Give the host its names back; models built so far keep what they have."""
    for name, original in _ORIGINALS.items():
        setattr(train, name, original)
    if host_has_seam("model_cls") and _is_bound(_MODEL_PARAMETER):
        with gin.unlock_config():
            gin.bind_parameter(_MODEL_PARAMETER, None)


def replaced_names() -> list[str]:
    """The names of the host that are not its own at the moment."""
    return [
        f"{train.__name__}.{name}"
        for name, original in _ORIGINALS.items()
        if getattr(train, name) is not original
    ]


def _is_bound(parameter: str) -> bool:
    try:
        return gin.query_parameter(parameter) is not None
    except ValueError:
        return False
