"""Restores the host's checkpoints into a model with slots."""

import functools
import logging
from typing import Any

import torch
from generative_recommenders.dlrm_v3 import checkpoint as host
from torch import Tensor

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3.model import DlrmHSTU
from hpgr_plugin.hosts.seams import replaced

logger = logging.getLogger(__name__)

_HOOK_STATE, _FROZEN_TABLE = "attention_hook._extra_state", "attention_hook.frozen_table"


def load_checkpoint(
    model: Any, optimizer: Any, metrics: Any, device: torch.device, *, fresh_slots: bool = False
) -> None:
    """The host's `load_dmp_checkpoint`, from the path that is bound to it.

    Args:
        model: The sharded model.
        optimizer: Its optimizer.
        metrics: The host's `MetricsLogger`.
        device: Of the model.
        fresh_slots: Take a checkpoint of the host's own model. What it lacks keeps its initial
            values and is logged; optimizer and metrics start anew.

    Raises:
        HpgrError: The checkpoint is of another model.
    """
    load_dense = functools.partial(load_dense_state_dict, fresh_slots=fresh_slots)
    with replaced(host, load_dense_state_dict=load_dense):
        host.load_dmp_checkpoint(
            model=model,
            optimizer=None if fresh_slots else optimizer,
            metric_logger=None if fresh_slots else metrics,
            device=device,
        )


@torch.no_grad()
def load_dense_state_dict(
    model: torch.nn.Module, state_dict: dict[str, Any], *, fresh_slots: bool = False
) -> None:
    """Copy the dense part of a checkpoint, the state of the attention hook included.

    The host copies tensors in place. That does not reach a hook's random generator or its layout,
    nor a frozen table whose size only the checkpoint knows.

    Raises:
        HpgrError: The checkpoint is of another model.
    """
    saved = _dense(state_dict)
    ranker = next(m for m in model.modules() if isinstance(m, DlrmHSTU))
    hook = ranker.attention_hook
    if isinstance(hook, PreferenceGuidedSparseAttention) and not fresh_slots:
        hook.restore_layout(saved, "attention_hook.")
        ranker.tell_layers_the_layout()
    table = saved.get(_FROZEN_TABLE)
    if isinstance(hook, PreferenceGuidedSparseAttention) and table is not None:
        hook.frozen_table = table.clone()
    own = _dense(model.state_dict())
    if fresh_slots:
        # SEM's preprocessor holds the host's own one level deeper.
        names = {name: name.replace("._preprocessor.", ".") for name in own}
        fresh = sorted(name for name in own if names[name] not in saved)
        logger.info("the checkpoint lacks %s: these start from their initial values", fresh)
        saved = {name: saved[names[name]] for name in own if names[name] in saved}
    elif own.keys() != saved.keys():
        raise HpgrError(
            f"the checkpoint is of another model: it lacks {sorted(own.keys() - saved.keys())}, "
            f"the model lacks {sorted(saved.keys() - own.keys())}. --fresh_slots takes a "
            "checkpoint of the host's own model"
        )
    for name, value in saved.items():
        if name == _HOOK_STATE and hook is not None:
            hook.set_extra_state(value)
        else:
            own[name].copy_(value)


def _dense(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in state_dict.items() if not host.is_sparse_key(k, v)}
