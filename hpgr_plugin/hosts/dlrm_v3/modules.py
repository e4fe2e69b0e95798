"""What stands in the places of the host's preprocessor, positional encoder and transducer."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from generative_recommenders.common import HammerModule
from generative_recommenders.modules.hstu_transducer import HSTUTransducer
from generative_recommenders.modules.preprocessors import InputPreprocessor
from torch import Tensor, nn

from hpgr_plugin.components.attention_hooks import Layout
from hpgr_plugin.hosts.dlrm_v3.attention import CandidateRows, PreferenceSTULayer, StepAttention
from hpgr_plugin.hosts.seams import host_has_seam
from hpgr_plugin.ops.compact.parts import (
    CompactRows,
    SequenceParts,
    compact_rows,
    sequence_parts,
    visible_plan,
)
from hpgr_plugin.ops.jagged import complete_cumsum
from hpgr_plugin.ops.preference_plan.plan import PreferencePlan


class SessionPreprocessor(InputPreprocessor):
    """SEM on the history rows of the raw item embeddings, then the host's own preprocessor.

    Contextual features, actions and side embeddings stay the host's. F is computed from the whole
    history of the sequence: where a history may reach past a candidate's own time, only the
    causal form of SEM keeps later sessions out of earlier tokens.

    Args:
        preprocessor: the host's.
        sem: `(embeddings [T, D], offsets [B + 1], timestamps [T]) -> [T, D]`.
    """

    def __init__(self, preprocessor: Any, sem: nn.Module) -> None:
        super().__init__(is_inference=preprocessor._is_inference)
        self.sem = sem
        self._preprocessor = preprocessor

    def forward(
        self,
        max_uih_len: int,
        max_targets: int,
        total_uih_len: int,
        total_targets: int,
        seq_lengths: Tensor,
        seq_timestamps: Tensor,
        seq_embeddings: Tensor,
        num_targets: Tensor,
        seq_payloads: dict[str, Tensor],
    ) -> Any:
        """See the host's preprocessors; sequences come in as `[history | candidates]`."""
        parts = sequence_parts(
            complete_cumsum(seq_lengths),
            num_targets,
            contextual_len=0,
            total_rows=len(seq_embeddings),
        )
        rows = parts.history_rows()
        enhanced = self.sem(
            seq_embeddings.index_select(0, rows), parts.history_offsets, seq_timestamps[rows]
        )
        return self._preprocessor(
            max_uih_len=max_uih_len,
            max_targets=max_targets,
            total_uih_len=total_uih_len,
            total_targets=total_targets,
            seq_lengths=seq_lengths,
            seq_timestamps=seq_timestamps,
            seq_embeddings=seq_embeddings.index_copy(0, rows, enhanced.to(seq_embeddings.dtype)),
            num_targets=num_targets,
            seq_payloads=seq_payloads,
        )

    def interleave_targets(self) -> bool:
        """As the host's preprocessor."""
        return bool(self._preprocessor.interleave_targets())


class TimeAwareHSTUPositionalEncoder(HammerModule):
    """Eq. 4 behind the signature of the host's positional encoder.

    As in the host, token embeddings are multiplied by sqrt(D) first. Contextual tokens have no
    time: each of the prefix's places has its own learned row, zero at the start. Every candidate
    is numbered by its own query time.

    Args:
        encoder: `TimeAwarePositionalEncoder` of the transducer's width.
        embedding_dim: D of the transducer.
        contextual_seq_len: tokens in front of every history.
        is_inference: as the host's modules.
    """

    def __init__(
        self, encoder: nn.Module, *, embedding_dim: int, contextual_seq_len: int, is_inference: bool
    ) -> None:
        super().__init__(is_inference=is_inference)
        self.encoder = encoder
        self.contextual_weight = nn.Parameter(torch.zeros(contextual_seq_len, embedding_dim))

    def forward(
        self,
        max_seq_len: int,
        seq_lengths: Tensor,
        seq_offsets: Tensor,
        seq_timestamps: Tensor,
        seq_embeddings: Tensor,
        num_targets: Tensor | None,
    ) -> Tensor:
        """`[L, D]` -> `[L, D]`; timestamps `[L]` in seconds, num_targets `[B]` candidates."""
        contextual_len, embedding_dim = self.contextual_weight.shape
        parts = sequence_parts(
            seq_offsets,
            torch.zeros_like(seq_lengths) if num_targets is None else num_targets,
            contextual_len=contextual_len,
            total_rows=len(seq_embeddings),
        )
        scaled = seq_embeddings * embedding_dim**0.5
        history_rows, candidate_rows = parts.history_rows(), parts.candidate_rows()
        history, candidates = self.encoder(
            scaled.index_select(0, history_rows),
            parts.history_offsets,
            seq_timestamps[history_rows],
            scaled.index_select(0, candidate_rows),
            parts.candidate_offsets,
            seq_timestamps[candidate_rows],
        )
        encoded = scaled.index_copy(0, history_rows, history.to(scaled.dtype))
        encoded = encoded.index_copy(0, candidate_rows, candidates.to(scaled.dtype))
        if contextual_len == 0:
            return encoded
        places = torch.arange(contextual_len, device=seq_offsets.device)
        rows = (parts.seq_offsets[:-1].unsqueeze(1) + places).flatten()
        added = self.contextual_weight.repeat(len(seq_lengths), 1)
        return encoded.index_add(0, rows, added.to(scaled.dtype))


class Request(NamedTuple):
    """What the attention of one forward pass should do.

    Attributes:
        plan: rows are candidates, or users (layout "per_user"); None: all.
        layout: of the plan.
        before_activation: SiLU(M s) instead of SiLU(s) M.
        hide_future: without a plan of candidates, whether a candidate is kept from history
            tokens at or after its own time (a plan of candidates has that done already).
    """

    plan: PreferencePlan | None
    layout: Layout
    before_activation: bool = False
    hide_future: bool = True


class PreferenceTransducer(HSTUTransducer):
    """The host's transducer, unless a `Request` is pending.

    Preprocessing, positions and postprocessing are the host's. In between, layouts
    "per_candidate" and "per_user" gather the planned rows into short sequences, run the host's
    layers on them and put the candidates' rows back where the host expects them; layout
    "shared_history" leaves the history rows as they are and weighs the candidates' own.
    """

    contextual_seq_len: int = 0
    _request: Request | None = None

    @contextlib.contextmanager
    def requested(self, request: Request | None) -> Iterator[None]:
        """`request` holds for the forward passes inside."""
        self._request = request
        try:
            yield
        finally:
            self._request = None

    @contextlib.contextmanager
    def attending(self, step: StepAttention) -> Iterator[None]:
        """`step` holds in all layers for the passes inside."""
        layers = [m for m in self._stu_module.modules() if isinstance(m, PreferenceSTULayer)]
        for layer in layers:
            layer.step = step
        try:
            yield
        finally:
            for layer in layers:
                layer.step = None

    def _hstu_compute(
        self,
        max_seq_len: int,
        seq_lengths: Tensor,
        seq_offsets: Tensor,
        seq_timestamps: Tensor,
        seq_embeddings: Tensor,
        num_targets: Tensor,
    ) -> Tensor:
        """`[L, D]` -> `[L, D]`; with short sequences, the history rows come back as zeros."""
        if self._request is None:
            return super()._hstu_compute(
                max_seq_len, seq_lengths, seq_offsets, seq_timestamps, seq_embeddings, num_targets
            )
        parts = sequence_parts(
            seq_offsets,
            num_targets,
            contextual_len=self.contextual_seq_len,
            total_rows=len(seq_embeddings),
        )
        plan, layout = self._request.plan, self._request.layout
        if plan is None or layout == "shared_history":
            step = StepAttention(candidates=self._candidate_rows(parts, seq_timestamps, plan))
            with self.attending(step):
                return super()._hstu_compute(
                    max_seq_len,
                    seq_lengths,
                    seq_offsets,
                    seq_timestamps,
                    seq_embeddings,
                    num_targets,
                )
        rows = compact_rows(parts, plan, per_user=layout == "per_user")
        return self._compute_compact(parts, rows, max_seq_len, seq_timestamps, seq_embeddings)

    def _compute_compact(
        self,
        parts: SequenceParts,
        rows: CompactRows,
        max_seq_len: int,
        seq_timestamps: Tensor,
        seq_embeddings: Tensor,
    ) -> Tensor:
        assert self._request is not None
        offsets = complete_cumsum(rows.lengths)
        short = sequence_parts(
            offsets,
            rows.num_targets,
            contextual_len=parts.contextual_len,
            total_rows=rows.index.numel(),
        )
        # The host divides by the longest sequence: it must stay that of the full batch.
        norm = rows.max_len / max_seq_len
        before = self._request.before_activation
        step = StepAttention(
            value_scale=torch.full_like(rows.weights, norm) if before else rows.weights * norm,
            key_scale=rows.weights if before else None,
            candidates=self._candidate_rows(short, seq_timestamps[rows.index], None)
            if self._request.layout == "per_user"
            else None,
        )
        # Not index_select: embedding's backward adds up the many copies of a history row in
        # float32 and in a fixed order.
        embeddings = F.embedding(rows.index, seq_embeddings)
        encoded = self._run_layers(step, rows, offsets, embeddings)
        candidates = encoded.index_select(0, short.candidate_rows())
        return torch.zeros_like(seq_embeddings, dtype=encoded.dtype).index_copy(
            0, parts.candidate_rows(), candidates
        )

    def _run_layers(
        self, step: StepAttention, rows: CompactRows, offsets: Tensor, embeddings: Tensor
    ) -> Tensor:
        arguments: dict[str, Any] = {
            "x": embeddings,
            "x_lengths": rows.lengths,
            "x_offsets": offsets,
            "max_seq_len": rows.max_len,
            "num_targets": rows.num_targets,
        }
        if host_has_seam("value_scale") and step.scales_values_only:
            return self._stu_module(**arguments, value_scale=step.value_scale)
        with self.attending(step):
            return self._stu_module(**arguments)

    def _candidate_rows(
        self, parts: SequenceParts, timestamps: Tensor, plan: PreferencePlan | None
    ) -> CandidateRows | None:
        """Weights of the candidates' rows; without a plan, only what keeps the future out."""
        assert self._request is not None
        if plan is None and self._request.hide_future:
            plan = visible_plan(
                timestamps[parts.history_rows()], timestamps[parts.candidate_rows()], parts
            )
        if plan is None:
            return None
        return CandidateRows(parts, plan, self._request.before_activation)
