"""The modules that replace the host's preprocessor and transducer."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from generative_recommenders.modules.hstu_transducer import HSTUTransducer
from generative_recommenders.modules.preprocessors import InputPreprocessor
from torch import Tensor

from hpgr_plugin.components.capture_checks import has_hooks
from hpgr_plugin.components.sem import SessionContext, SessionEnhancementModule
from hpgr_plugin.hosts.dlrm_v3.attention import (
    CandidateRows,
    PreferenceSTULayer,
    RowSequences,
    StepAttention,
)
from hpgr_plugin.hosts.dlrm_v3.captured_passes import CapturedPasses
from hpgr_plugin.hosts.dlrm_v3.fused import FusedLayers
from hpgr_plugin.hosts.dlrm_v3.positions import set_places
from hpgr_plugin.hosts.dlrm_v3.request import Request
from hpgr_plugin.hosts.seams import host_has_seam
from hpgr_plugin.ops.compact.parts import (
    SequenceParts,
    joined_parts,
    sequence_parts,
    short_sequences,
    visible_plan,
)
from hpgr_plugin.ops.jagged import complete_cumsum
from hpgr_plugin.ops.preference_plan import PreferencePlan


class SessionPreprocessor(InputPreprocessor):
    """SEM on the history rows of the raw item embeddings, then the host's own preprocessor.

    Contextual features, actions and side embeddings do not pass through SEM.

    Args:
        preprocessor: The host's.
        sem: Of the item table's width.
        ticks_per_second: Units of the timestamps in a second: 1, or 1000 for milliseconds.

    Attributes:
        context: What SEM made of the whole histories, for passes with shortened ones; None: SEM
            runs on the sequences as they come.
    """

    context: SessionContext | None = None

    def __init__(
        self, preprocessor: Any, sem: SessionEnhancementModule, *, ticks_per_second: int = 1
    ) -> None:
        super().__init__(is_inference=preprocessor._is_inference)
        self.sem = sem
        self.ticks_per_second = ticks_per_second
        self._preprocessor = preprocessor

    def forward(
        self,
        *,
        seq_lengths: Tensor,
        seq_timestamps: Tensor,
        seq_embeddings: Tensor,
        num_targets: Tensor,
        total_targets: int,
        **others: Any,
    ) -> Any:
        """As the host's preprocessors; the sequences are `[history | candidates]`."""
        parts = sequence_parts(
            complete_cumsum(seq_lengths),
            num_targets,
            contextual_len=0,
            total_rows=len(seq_embeddings),
            num_candidates=total_targets,
        )
        rows = parts.history_rows()
        history = seq_embeddings.index_select(0, rows)
        if self.context is None:
            seconds = seq_timestamps[rows] // self.ticks_per_second
            enhanced = self.sem(history, parts.history_offsets, seconds)
        else:
            enhanced = self.sem.fuse(history, self.context)
        return self._preprocessor(
            seq_lengths=seq_lengths,
            seq_timestamps=seq_timestamps,
            seq_embeddings=seq_embeddings.index_copy(0, rows, enhanced.to(seq_embeddings.dtype)),
            num_targets=num_targets,
            total_targets=total_targets,
            **others,
        )

    def interleave_targets(self) -> bool:
        """As the host's preprocessor says."""
        return bool(self._preprocessor.interleave_targets())


class PreferenceTransducer(HSTUTransducer):
    """The host's transducer; while a `Request` is set on it, it follows that.

    Its sequences may have been shortened before they come here; positions, the n of 1/n and SEM's
    context are then those of the full ones. Layout "per_candidate" with several candidates of a
    user gathers a sequence for each of them out of the user's rows. With a request, only the
    candidates' rows are computed to the end.

    Attributes:
        contextual_seq_len: Tokens in front of every history.
        layers: Runs the layers where it can; None: the host's own do.
        captured: Replays passes with a request from CUDA graphs where it can; None: never.
    """

    contextual_seq_len: int = 0
    layers: FusedLayers | None = None
    captured: CapturedPasses | None = None
    _request: Request | None = None

    def forward(self, **call: Any) -> Any:
        """As the host's: the candidates `[C, D]`, and None with a request."""
        if self._request is not None and self._can_capture(call["seq_embeddings"]):
            assert self.captured is not None
            candidates = self.captured.run(self, call, self._request)
            if candidates is not None:
                return candidates, None
        return super().forward(**call)

    def _can_capture(self, rows: Tensor) -> bool:
        if self.captured is None or self.layers is None or torch.jit.is_tracing():
            return False
        return self.layers.expected(self._stu_module, rows.device)

    def run_request(self, call: dict[str, Any], request: Request) -> Tensor:
        """Candidates `[C, D]` of these arguments of `forward` and their request."""
        with self.requested(request):
            candidates: Tensor = super().forward(**call)[0]
        return candidates

    @contextlib.contextmanager
    def requested(self, request: Request) -> Iterator[None]:
        """Forward passes inside follow `request`, those after it the one before."""
        before = self._request
        try:
            self._follow(request)
            yield
        finally:
            self._follow(before)

    def _follow(self, request: Request | None) -> None:
        preprocessor = self._input_preprocessor
        self._request = request
        set_places(self._positional_encoder, None if request is None else request.places)
        if isinstance(preprocessor, SessionPreprocessor):
            preprocessor.context = None if request is None else request.context

    @contextlib.contextmanager
    def attending(self, step: StepAttention) -> Iterator[None]:
        """All layers follow `step` in the passes inside."""
        layers = [m for m in self._stu_module.modules() if isinstance(m, PreferenceSTULayer)]
        for layer in layers:
            layer.step = step
        try:
            yield
        finally:
            for layer in layers:
                layer.step = None

    def run_layers(self, x: Tensor, sequences: RowSequences, step: StepAttention) -> Tensor:
        """The layers over these rows: all that lies between their input and the candidates' output.

        Args:
            x: `[L, D]`.
            sequences: That the rows belong to.
            step: What the plan changes in their attention.

        Returns:
            `[C, D]`, the candidates in their order.
        """
        if self.layers is not None:
            candidates = self.layers.run(self._stu_module, x, sequences, step)
            if candidates is not None:
                return candidates
        layers = self._own_layers()
        if layers is None or not layers[-1].can_read_candidates(x):
            encoded = self._inner_layers(self._stu_module, x, sequences, step)
            return encoded.index_select(0, sequences.parts.candidate_rows())
        # The last layer's output is read at the candidates only.
        for layer in layers[:-1]:
            x = self._inner_layers(layer, x, sequences, step)
        return layers[-1].read_candidates(x, sequences, step)

    def _own_layers(self) -> list[PreferenceSTULayer] | None:
        """The layers in their order, if they are this package's and nothing wraps or hooks them."""
        layers = list(getattr(self._stu_module, "_stu_layers", ()))
        own = layers and all(isinstance(layer, PreferenceSTULayer) for layer in layers)
        return layers if own and not any(map(has_hooks, (self._stu_module, *layers))) else None

    def _inner_layers(
        self, module: Any, x: Tensor, sequences: RowSequences, step: StepAttention
    ) -> Tensor:
        """All rows `[L, D]` through one of the host's layers, or all of them."""
        arguments: dict[str, Any] = {
            "x": x,
            "x_lengths": sequences.lengths,
            "x_offsets": sequences.parts.seq_offsets,
            "max_seq_len": sequences.max_length,
            "num_targets": sequences.num_targets,
        }
        scale = step.value_scale if step.scales_values_only else None
        own = isinstance(module, PreferenceSTULayer)
        if scale is not None and not own and host_has_seam("value_scale"):
            scaled: Tensor = module(**arguments, value_scale=scale)
            return scaled
        with self.attending(step):
            whole: Tensor = module(**arguments)
        return whole

    def _hstu_compute(
        self,
        max_seq_len: int,
        seq_lengths: Tensor,
        seq_offsets: Tensor,
        seq_timestamps: Tensor,
        seq_embeddings: Tensor,
        num_targets: Tensor,
    ) -> Tensor:
        """`[L, D]` -> `[L, D]`, or the candidates only `[C, D]` with a request."""
        request = self._request
        if request is None:
            return super()._hstu_compute(
                max_seq_len, seq_lengths, seq_offsets, seq_timestamps, seq_embeddings, num_targets
            )
        if request.plan is not None and request.layout == "per_candidate" and not request.by_user:
            return self._one_sequence_each(request, request.plan, max_seq_len, seq_embeddings)
        sequences = RowSequences(
            request.parts,
            seq_lengths,
            num_targets,
            max_seq_len,
            request.max_targets,
        )
        weights, plan = None, request.plan
        if request.by_user and plan is not None:
            weights, plan = _scaled(_weights_of_rows(request.parts, plan), request), None
        step = StepAttention(
            column_weights=weights,
            mask_position=request.mask_position,
            norm_ratio=max_seq_len / (request.full_length or max_seq_len),
            candidates=None
            if request.layout == "per_candidate"
            else self._candidate_mask(request, plan, seq_timestamps),
        )
        return self.run_layers(seq_embeddings, sequences, step)

    def _one_sequence_each(
        self, request: Request, plan: PreferencePlan, max_seq_len: int, seq_embeddings: Tensor
    ) -> Tensor:
        """A sequence for each candidate, gathered out of its user's rows."""
        longest = plan.longest() if request.longest_row is None else request.longest_row
        rows = short_sequences(
            request.parts,
            plan,
            per_user=False,
            max_length=longest + request.parts.contextual_len + 1,
        )
        candidates = torch.arange(plan.offsets.numel(), device=plan.offsets.device)
        parts = joined_parts(
            plan.offsets,
            candidates,
            contextual_len=request.parts.contextual_len,
            num_history=plan.index.numel(),
            num_candidates=request.parts.num_candidates,
            one_candidate_each=True,
        )
        sequences = RowSequences(
            parts,
            rows.lengths,
            rows.num_targets,
            rows.max_len,
            1,
        )
        step = StepAttention(
            column_weights=_scaled(rows.weights, request),
            mask_position=request.mask_position,
            norm_ratio=rows.max_len / (request.full_length or max_seq_len),
        )
        # Not index_select: embedding's backward adds up the many copies of a history row in
        # float32 and in a fixed order.
        return self.run_layers(F.embedding(rows.index, seq_embeddings), sequences, step)

    def _candidate_mask(
        self, request: Request, plan: PreferencePlan | None, timestamps: Tensor
    ) -> CandidateRows | None:
        """The mask of the candidates' rows; without a plan, of the future only (None: nothing)."""
        parts = request.parts
        if plan is None and request.hide_future:
            plan = visible_plan(
                timestamps[parts.history_rows()], timestamps[parts.candidate_rows()], parts
            )
        if plan is None:
            return None
        return CandidateRows(parts, plan, request.mask_position, request.max_targets)

    def _postprocess(
        self,
        *,
        seq_embeddings: Tensor,
        seq_timestamps: Tensor,
        seq_payloads: dict[str, Tensor],
        **others: Any,
    ) -> tuple[Tensor | None, Tensor]:
        """As the host's; with a request, the embeddings are those of the candidates already."""
        if self._request is None:
            return super()._postprocess(
                seq_embeddings=seq_embeddings,
                seq_timestamps=seq_timestamps,
                seq_payloads=seq_payloads,
                **others,
            )
        return None, self._output_postprocessor(
            seq_embeddings=seq_embeddings,
            seq_timestamps=seq_timestamps.index_select(0, self._request.parts.candidate_rows()),
            seq_payloads=seq_payloads,
        )


def _scaled(weights: Tensor, request: Request) -> Tensor:
    return weights if request.weight_scale is None else weights * request.weight_scale


def _weights_of_rows(parts: SequenceParts, plan: PreferencePlan) -> Tensor:
    """M_j of every row `[L]`: of the history rows as planned, 1 of all others."""
    weights = plan.weights.new_ones(parts.total_rows)
    weights[parts.history_rows()] = plan.weights
    return weights
