"""Refuses `torch.jit.trace`, which would record the sizes of one batch."""

import torch

from hpgr_plugin.errors import HpgrError


def refuse_jit_trace(binding: str) -> None:
    """Filled slots compute with sizes that depend on the batch, and a trace keeps the first ones.

    Raises:
        HpgrError: the pass is being traced.
    """
    if torch.jit.is_tracing():
        raise HpgrError(
            f"torch.jit.trace cannot record {binding} with filled slots: it would keep this "
            "batch's sizes. Use hpgr_plugin.hosts.dlrm_v3.program.export_program (torch.export)"
        )
