"""Counts what would make the host wait for a CUDA device, seen from the CPU."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts the operators whose result the host reads, or whose size depends on the data."""

    NAMES = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "bincount")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        waits = name in self.NAMES
        waits |= name == "repeat_interleave" and kwargs.get("output_size") is None
        if name.startswith("index") and isinstance(args[1], list | tuple):
            waits |= any(i is not None and i.dtype == torch.bool for i in args[1])
        if waits:
            self.seen.append(name)
        return func(*args, **kwargs)
