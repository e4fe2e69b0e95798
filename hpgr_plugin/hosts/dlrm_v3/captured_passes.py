"""Training passes of the transducer, replayed from CUDA graphs where that saves time."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from hpgr_plugin.components.capture_checks import ModuleWatch
from hpgr_plugin.components.captured import MOST_GRAPHS, CapturedFunction
from hpgr_plugin.hosts.dlrm_v3.features import Features
from hpgr_plugin.hosts.dlrm_v3.padded import PaddedPass, can_pad, is_whole
from hpgr_plugin.hosts.dlrm_v3.request import Request
from hpgr_plugin.hosts.requirements import HOST_PACKAGE
from hpgr_plugin.log_once import log_once
from hpgr_plugin.ops.dispatch import backend_choices

logger = logging.getLogger(__name__)

# Beyond so many rows of the layers, launches cost less than the work.
_MOST_ROWS = 1 << 17
_MOST_WHOLE_ROWS = 3 << 16  # of a shared history, which takes more launches
_MOST_WHOLE_GRAPHS = 8  # their inputs take much memory
_KNOWN_CODE = (f"{HOST_PACKAGE}.", "hpgr_plugin.")


class CapturedPasses:
    """Training passes of the transducer with a plan, replayed from CUDA graphs.

    Args:
        features: of the host's configuration.
        binding: the gin binding that switches capturing off.
    """

    def __init__(self, features: Features, *, binding: str) -> None:
        self._features = features
        self._binding = binding
        self._function = CapturedFunction(binding)
        self._watch = ModuleWatch(_KNOWN_CODE)

    def run(self, transducer: Any, call: dict[str, Any], request: Request) -> Tensor | None:
        """The candidates `[C, D]`, or None where the pass has to run launch by launch.

        Args:
            transducer: to run.
            call: the arguments of its forward.
            request: of the batch.
        """
        if not (transducer.training and can_pad(request, call)):
            return None
        most_rows = _MOST_WHOLE_ROWS if is_whole(request) else _MOST_ROWS
        if not 0 < layer_rows(request) <= most_rows:
            return None
        state = self._watch.state(transducer)
        if state.why_not:
            log_once(logger, f"{self._binding} = True has no effect: {state.why_not}")
            return None
        padded = PaddedPass(call, request, self._features)

        def run_padded(copies: dict[str, Tensor], parameters: dict[str, Tensor]) -> Tensor:
            own = {f"transducer.{name}": tensor for name, tensor in parameters.items()}
            candidates: Tensor = torch.func.functional_call(
                _Requests(transducer), own, padded.arguments(copies)
            )
            return candidates

        key = padded.key, state.settings, tuple(backend_choices().items())
        return self._function.run(
            run_padded,
            padded.inputs,
            state.tensors,
            key,
            rows=padded.num_candidates,
            most_graphs=_MOST_WHOLE_GRAPHS if is_whole(request) else MOST_GRAPHS,
            at_first=not is_whole(request),
        )


class _Requests(nn.Module):
    """Calls `run_request` of a transducer as a module, so that its parameters can be exchanged."""

    def __init__(self, transducer: Any) -> None:
        super().__init__()
        self.transducer = transducer

    def forward(self, call: dict[str, Any], request: Request) -> Tensor:
        candidates: Tensor = self.transducer.run_request(call, request)
        return candidates


def layer_rows(request: Request) -> int:
    """The most rows that a part of the transducer computes.

    Candidates with a row of the plan each have sequences of their own: a history row that several
    of them keep is gathered for each.
    """
    parts, plan = request.parts, request.plan
    if plan is None or request.by_user or request.layout != "per_candidate":
        return parts.total_rows
    gathered = plan.index.numel() + parts.num_candidates * (parts.contextual_len + 1)
    return max(parts.total_rows, gathered)
