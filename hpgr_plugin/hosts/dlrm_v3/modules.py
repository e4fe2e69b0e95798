"""The modules that replace the host's preprocessor, positional encoder and transducer."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from generative_recommenders.common import HammerModule
from generative_recommenders.modules.hstu_transducer import HSTUTransducer
from generative_recommenders.modules.preprocessors import InputPreprocessor
from torch import Tensor, nn

from hpgr_plugin.components.attention_hooks import Layout, MaskPosition
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.hosts.dlrm_v3.attention import CandidateRows, PreferenceSTULayer, StepAttention
from hpgr_plugin.hosts.seams import host_has_seam
from hpgr_plugin.ops.compact.parts import (
    SequenceParts,
    ShortSequences,
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
    """

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
        **others: Any,
    ) -> Any:
        """As the host's preprocessors; the sequences are `[history | candidates]`."""
        parts = sequence_parts(
            complete_cumsum(seq_lengths),
            num_targets,
            contextual_len=0,
            total_rows=len(seq_embeddings),
        )
        rows = parts.history_rows()
        enhanced = self.sem(
            seq_embeddings.index_select(0, rows),
            parts.history_offsets,
            seq_timestamps[rows] // self.ticks_per_second,
        )
        return self._preprocessor(
            seq_lengths=seq_lengths,
            seq_timestamps=seq_timestamps,
            seq_embeddings=seq_embeddings.index_copy(0, rows, enhanced.to(seq_embeddings.dtype)),
            num_targets=num_targets,
            **others,
        )

    def interleave_targets(self) -> bool:
        """As the host's preprocessor says."""
        return bool(self._preprocessor.interleave_targets())


class TimeAwareHSTUPositionalEncoder(HammerModule):
    """Time-aware positions (Eq. 4) with the signature of the host's positional encoder.

    As in the host, embeddings are multiplied by sqrt(D) first. Contextual tokens have no time:
    each of their places has a learned row of its own, zero at the start. Every candidate is
    numbered by its own query time.

    Args:
        encoder: `TimeAwarePositionalEncoder` of the transducer's width.
        embedding_dim: D of the transducer.
        contextual_seq_len: Tokens in front of every history.
        is_inference: As in the host's modules.
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
        """Add the positions.

        Args:
            max_seq_len: The longest sequence; not used.
            seq_lengths: `[B]`.
            seq_offsets: `[B + 1]`.
            seq_timestamps: `[L]` seconds.
            seq_embeddings: `[L, D]`.
            num_targets: Candidates at the end of each sequence `[B]`, or None.

        Returns:
            `[L, D]`.
        """
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
        plan: Its rows are candidates, or users (layout "per_user"); None keeps all history.
        layout: That of the plan.
        mask_position: "post" A' = SiLU(s) * M, "pre" A' = SiLU(M * s).
        hide_future: Whether, without a plan of candidates, history at or after a candidate's own
            time is hidden from it (a plan of candidates hides it already).
    """

    plan: PreferencePlan | None
    layout: Layout
    mask_position: MaskPosition = "post"
    hide_future: bool = True


class PreferenceTransducer(HSTUTransducer):
    """The host's transducer; while a `Request` is set on it, its attention follows that.

    Preprocessing, positions and postprocessing are the host's. With layouts "per_candidate" and
    "per_user" the planned rows are gathered into short sequences, the host's layers run on those,
    and the candidates' rows go back to where the host expects them. Layout "shared_history" leaves
    the sequences as they are and weighs the candidates' rows of the attention.

    Attributes:
        contextual_seq_len: Tokens in front of every history.
    """

    contextual_seq_len: int = 0
    _request: Request | None = None

    @contextlib.contextmanager
    def requested(self, request: Request | None) -> Iterator[None]:
        """Forward passes inside follow `request`."""
        self._request = request
        try:
            yield
        finally:
            self._request = None

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

    def _hstu_compute(
        self,
        max_seq_len: int,
        seq_lengths: Tensor,
        seq_offsets: Tensor,
        seq_timestamps: Tensor,
        seq_embeddings: Tensor,
        num_targets: Tensor,
    ) -> Tensor:
        """`[L, D]` -> `[L, D]`; history rows are zero where short sequences were computed."""
        compute = functools.partial(
            super()._hstu_compute,
            max_seq_len,
            seq_lengths,
            seq_offsets,
            seq_timestamps,
            seq_embeddings,
            num_targets,
        )
        if self._request is None:
            return compute()
        parts = sequence_parts(
            seq_offsets,
            num_targets,
            contextual_len=self.contextual_seq_len,
            total_rows=len(seq_embeddings),
        )
        plan, layout = self._request.plan, self._request.layout
        if plan is not None and layout != "shared_history":
            rows = short_sequences(parts, plan, per_user=layout == "per_user")
            return self._compute_compact(parts, rows, max_seq_len, seq_timestamps, seq_embeddings)
        step = StepAttention(candidates=self._candidate_rows(parts, seq_timestamps, plan))
        with self.attending(step):
            return compute()

    def _compute_compact(
        self,
        parts: SequenceParts,
        rows: ShortSequences,
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
        pre = self._request.mask_position == "pre"
        step = StepAttention(
            value_scale=torch.full_like(rows.weights, norm) if pre else rows.weights * norm,
            key_scale=rows.weights if pre else None,
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
        self, step: StepAttention, rows: ShortSequences, offsets: Tensor, embeddings: Tensor
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
        """The mask of the candidates' rows; without a plan, of the future only (None: nothing)."""
        assert self._request is not None
        if plan is None and self._request.hide_future:
            plan = visible_plan(
                timestamps[parts.history_rows()], timestamps[parts.candidate_rows()], parts
            )
        if plan is None:
            return None
        return CandidateRows(parts, plan, self._request.mask_position)
