"""Attach the slots to the host's trainer and inference harness, by seams where it has them."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from generative_recommenders.dlrm_v3.train import utils as train

from hpgr_plugin.config.registry import configured
from hpgr_plugin.hosts.dlrm_v3 import inference
from hpgr_plugin.hosts.dlrm_v3.model import DlrmHSTU
from hpgr_plugin.hosts.seams import bind, host_has_seam, is_bound, replaced
from hpgr_plugin.transfer.learning_rates import by_lr_scale, lr_scale

_KeyedOptimizerWrapper: Any = train.KeyedOptimizerWrapper
_DistributedModelParallel: Any = train.DistributedModelParallel
_apply_optimizer_in_backward: Callable[..., None] = train.apply_optimizer_in_backward

_MODEL_CLASS = "make_model.model_cls"


class InheritedLrOptimizer(_KeyedOptimizerWrapper):
    """The host's dense optimizer with one parameter group per learning rate."""

    def __init__(
        self,
        params: Mapping[str, torch.Tensor],
        optim_factory: Callable[[Any], torch.optim.Optimizer],
        **others: Any,
    ) -> None:
        groups = by_lr_scale(params.values())

        def with_groups(parameters: Any) -> torch.optim.Optimizer:
            if set(groups) <= {1.0}:
                return optim_factory(parameters)
            optimizer = optim_factory([{"params": group} for group in groups.values()])
            for scale, group in zip(groups, optimizer.param_groups, strict=True):
                group["lr"] *= scale
            return optimizer

        super().__init__(params, with_groups, **others)


class PretrainedModelParallel(_DistributedModelParallel):
    """Shards the model as the host does, then loads the hand-over into the shards.

    The trainer restores a checkpoint after that, so a checkpoint overwrites the hand-over.
    """

    # The contract reads the parameters of the class that this one replaces.
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
    """The host's fused sparse optimizer, with the smaller learning rate for inherited tables."""
    for parameter in params:
        settings = {**optimizer_kwargs, "lr": optimizer_kwargs["lr"] * lr_scale(parameter)}
        _apply_optimizer_in_backward(optimizer_class, [parameter], settings, *args, **kwargs)


# Name in the host's `dlrm_v3.train.utils` -> its replacement, and the seam of a patched host with
# which no replacement is needed.
_REPLACEMENTS: dict[str, tuple[Any, str]] = {
    "DlrmHSTU": (configured("DlrmHSTU"), "model_cls"),
    "KeyedOptimizerWrapper": (InheritedLrOptimizer, "lr_scale"),
    "DistributedModelParallel": (PretrainedModelParallel, "lr_scale"),
    "apply_optimizer_in_backward": (apply_with_inherited_lr, "lr_scale"),
}
_undo = contextlib.ExitStack()
_replaced: list[str] = []


def attach() -> None:
    """Let the host's trainer and inference build the model with slots; again changes nothing.

    A host with the patch series takes the model class as the gin parameter `make_model.model_cls`,
    which is bound here unless the configuration binds it. `gin.clear_config` removes that binding:
    call `attach` again then. In other hosts the names that the trainer looks up are replaced, and
    in all of them those of the inference harness, for which there is no seam.
    """
    if host_has_seam("model_cls") and not is_bound(_MODEL_CLASS):
        bind(_MODEL_CLASS, configured("DlrmHSTU"))
    if not _replaced:
        values = {n: new for n, (new, seam) in _REPLACEMENTS.items() if not host_has_seam(seam)}
        for module, names in ((train, values), *inference.replacements()):
            _undo.enter_context(replaced(module, **names))
            _replaced.extend(f"{module.__name__}.{name}" for name in names)


def detach() -> None:
    """Undo `attach`; models that were built before keep their slots."""
    _undo.close()
    _replaced.clear()
    if host_has_seam("model_cls") and is_bound(_MODEL_CLASS):
        bind(_MODEL_CLASS, None)


def replaced_names() -> list[str]:
    """The names of the host that are replaced at the moment."""
    return list(_replaced)
