"""The host's STU layer with the weights of a preference plan in its attention."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from generative_recommenders.modules.stu import STULayer
from generative_recommenders.ops.hstu_attention import hstu_mha
from generative_recommenders.ops.hstu_compute import hstu_compute_output, hstu_compute_uqvk
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hpgr_plugin.components.attention_hooks import Layout, MaskPosition
from hpgr_plugin.hosts.contract import accepts
from hpgr_plugin.ops.compact.parts import SequenceParts, row_weights
from hpgr_plugin.ops.hstu_attention import AttentionSpec, hstu_attention
from hpgr_plugin.ops.preference_plan import PreferencePlan

# Until 2026 the host had one flag for what goes into its output projection, since then three.
_OUTPUT_FLAGS: dict[str, Any] = (
    {"concat_ux": True}
    if accepts(hstu_compute_output, "concat_ux")
    else {"concat_u": True, "concat_x": True, "mul_u_activation_type": "none"}
)
_NORM_EPS = 1e-6
_ROWS_TO_RECOMPUTE = 2**16  # below, memory is no matter, and launches are
KERNEL_SIZES = (16, 32, 64, 128, 256)  # of heads, for which this package has kernels


@dataclass
class CandidateRows:
    """The attention mask M of the candidates' own rows (Eq. 5), over the columns of their sequence.

    Attributes:
        parts: Of the sequences; in cached inference, of the full ones (cached and new).
        plan: One row per candidate.
        mask_position: "post" A' = SiLU(s) * M, "pre" A' = SiLU(M * s).
        max_candidates: The most candidates of a user, or more; None: the device is asked.
    """

    parts: SequenceParts
    plan: PreferencePlan
    mask_position: MaskPosition = "post"
    max_candidates: int | None = None
    _spec: AttentionSpec | None = field(default=None, repr=False)

    def attention_spec(self, max_seq_len: int, alpha: float) -> AttentionSpec:
        """The attention of the candidates over whole sequences, the same for all layers of a step.

        Args:
            max_seq_len: The longest sequence, which is also the host's n.
            alpha: Factor on q . k.
        """
        if self._spec is None or (self._spec.max_length, self._spec.alpha) != (max_seq_len, alpha):
            most, users = self.max_candidates, self.parts.candidate_offsets.numel() - 1
            if most is None:
                most = int(self.parts.candidate_offsets.diff().max()) if users else 0
            self._spec = AttentionSpec(
                offsets=self.parts.seq_offsets,
                max_length=max_seq_len,
                alpha=alpha,
                norm_length=max_seq_len,
                query_offsets=self.parts.candidate_offsets,
                max_query_length=most,
                causal=False,
                row_weights=row_weights(self.parts, self.plan, max_seq_len),
                mask_position=self.mask_position,
                exact=True,
            )
        return self._spec


@dataclass(frozen=True)
class StepAttention:
    """What a plan changes in the attention of one forward pass, the same for all layers.

    Attributes:
        column_weights: M_j of each row `[L]` of the sequences, or None for ones.
        mask_position: Where they enter: "post" A' = SiLU(s) * M, "pre" A' = SiLU(M * s).
        norm_ratio: The n that the layers are told over the n of the full sequences: the host
            divides by the longest sequence it gets, and that must stay the full one.
        candidates: Mask of the candidates' own rows, or None.
    """

    column_weights: Tensor | None = None
    mask_position: MaskPosition = "post"
    norm_ratio: float = 1.0
    candidates: CandidateRows | None = None

    @functools.cached_property
    def value_scale(self) -> Tensor | None:
        """Factor of the value rows `[L]`, or None."""
        weights = self.column_weights
        if weights is None:
            return None
        if self.mask_position == "pre":
            return torch.full_like(weights, self.norm_ratio)
        return weights * self.norm_ratio

    @property
    def key_scale(self) -> Tensor | None:
        """Factor of the key rows `[L]`, or None."""
        return self.column_weights if self.mask_position == "pre" else None

    @property
    def scales_values_only(self) -> bool:
        """Whether nothing but a factor on the value rows is needed."""
        return self.key_scale is None and self.candidates is None


class RowSequences(NamedTuple):
    """The sequences that the layers run on, `[contextual | history | candidates]` each.

    Attributes:
        parts: Where the rows lie.
        lengths: `[S]`.
        num_targets: `[S]` candidates at the end of each.
        max_length: The longest of them, or more: the n that the host's layers divide by.
        max_targets: The most candidates of a sequence, or more.
    """

    parts: SequenceParts
    lengths: Tensor
    num_targets: Tensor
    max_length: int
    max_targets: int

    @property
    def one_target(self) -> bool:
        """Whether each sequence ends in exactly one candidate."""
        return self.parts.one_candidate_each


class PreferenceSTULayer(STULayer):
    """The host's layer; while a `StepAttention` is set on it, its attention follows that.

    Every column of HSTU attention is weighed by itself, so a weight on column j is a factor on
    value row j: the host's projections and attention kernels run unchanged on scaled rows.

    Attributes:
        step: The plan's changes for the passes that are running, or None.
        layout: That of the attention hook, on which cached inference depends.
    """

    step: StepAttention | None = None
    layout: Layout | None = None

    def forward(
        self,
        x: Tensor,
        x_lengths: Tensor,
        x_offsets: Tensor,
        max_seq_len: int,
        num_targets: Tensor,
        max_kv_caching_len: int = 0,
        kv_caching_lengths: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> Tensor:
        """`[L, D]` -> `[L, D]`, as the host's layer; `value_scale` needs a patched host."""
        cache = {"max_kv_caching_len": max_kv_caching_len, "kv_caching_lengths": kv_caching_lengths}
        if kv_caching_lengths is not None:
            self._refuse_per_candidate()
        if self.step is None:
            scale = {} if value_scale is None else {"value_scale": value_scale}
            return super().forward(
                x=x,
                x_lengths=x_lengths,
                x_offsets=x_offsets,
                max_seq_len=max_seq_len,
                num_targets=num_targets,
                **cache,
                **scale,
            )
        if kv_caching_lengths is not None:
            _, _, k, v = self._project(x)
            self.update_kv_cache(max_seq_len=max_seq_len, seq_offsets=x_offsets, k=k, v=v, **cache)
        u, attention = self._saving_memory(
            self._attend,
            x,
            self.step,
            max_seq_len=max_seq_len,
            x_offsets=x_offsets,
            num_targets=num_targets,
        )
        return self._output(attention, u, x)

    def recomputes(self, x: Tensor) -> bool:
        """Whether what the projection of these rows gives is made again in the backward."""
        large = len(x) >= _ROWS_TO_RECOMPUTE and torch.is_grad_enabled()
        return large and bool(self._recompute_uvqk)

    def _saving_memory(self, function: Callable[..., Any], x: Tensor, *args: Any, **kw: Any) -> Any:
        """Run `function(x, ...)`; of a large batch only x is kept for the backward."""
        if not self.recomputes(x):
            return function(x, *args, **kw)

        # The host's Triton attention asks for what it saved more than once, and in inference mode,
        # which only the reentrant form allows: its backward runs the whole function anew.
        return checkpoint(
            lambda rows: function(rows, *args, **kw),
            x,
            use_reentrant=True,
            preserve_rng_state=False,
        )

    def _attend(
        self,
        x: Tensor,
        step: StepAttention,
        *,
        max_seq_len: int,
        x_offsets: Tensor,
        num_targets: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """u `[L, H * dv]` and the attention `[L, H, dv]` of every row."""
        u, q, k, v = self._project(x)
        k, v = _scaled(k, step.key_scale), _scaled(v, step.value_scale)
        attention = hstu_mha(
            max_seq_len=max_seq_len,
            alpha=self._attn_alpha,
            q=q,
            k=k,
            v=v,
            seq_offsets=x_offsets,
            causal=self._causal,
            dropout_pr=0.0,
            training=self.training,
            num_targets=num_targets if self._target_aware else None,
            max_attn_len=self._max_attn_len,
            contextual_seq_len=self._contextual_seq_len,
            sort_by_length=self._sort_by_length,
            kernel=self.hammer_kernel(),
        ).view(-1, self._num_heads, self._hidden_dim)
        candidates = step.candidates
        if candidates is None:
            return u, attention
        index = candidates.parts.candidate_rows()
        spec = candidates.attention_spec(max_seq_len, self._attn_alpha)
        own = hstu_attention(q.index_select(0, index), k, v, spec)
        return u, attention.index_copy(0, index, own.to(attention.dtype))

    def can_read_candidates(self, x: Tensor) -> bool:
        """Whether `read_candidates` knows this layer's attention, and is fast at it."""
        plain = self._causal and self._target_aware
        plain = plain and not self._max_attn_len and not self._contextual_seq_len
        sizes = self._attention_dim, self._hidden_dim
        return plain and not (x.is_cuda and any(size not in KERNEL_SIZES for size in sizes))

    def read_candidates(self, x: Tensor, sequences: RowSequences, step: StepAttention) -> Tensor:
        """As `forward`, the candidates' rows only: `[L, D]` -> `[C, D]`."""
        rows = sequences.parts.candidate_rows()
        u, attention = self._saving_memory(self._read, x, rows, sequences, step)
        return self._output(attention, u, x.index_select(0, rows))

    def _read(
        self, x: Tensor, rows: Tensor, sequences: RowSequences, step: StepAttention
    ) -> tuple[Tensor, Tensor]:
        """u `[C, H * dv]` and the attention `[C, H, dv]` of the candidates."""
        u, q, k, v = self._project(x)
        if step.candidates is None:
            spec = self._reading_spec(sequences, step)
        else:
            k, v = _scaled(k, step.key_scale), _scaled(v, step.value_scale)
            spec = step.candidates.attention_spec(sequences.max_length, self._attn_alpha)
        return u.index_select(0, rows), hstu_attention(q.index_select(0, rows), k, v, spec)

    def _reading_spec(self, sequences: RowSequences, step: StepAttention) -> AttentionSpec:
        """Every candidate over its sequence, with the weights of its columns."""
        parts = sequences.parts
        return AttentionSpec(
            offsets=parts.seq_offsets,
            max_length=sequences.max_length,
            alpha=self._attn_alpha,
            norm_length=sequences.max_length / step.norm_ratio,
            query_offsets=parts.candidate_offsets,
            max_query_length=1 if sequences.one_target else sequences.max_targets,
            num_targets=None if sequences.one_target else sequences.num_targets,
            column_weights=step.column_weights,
            mask_position=step.mask_position,
            exact=True,
        )

    def cached_forward(
        self,
        delta_x: Tensor,
        num_targets: Tensor,
        max_kv_caching_len: int = 0,
        kv_caching_lengths: Tensor | None = None,
    ) -> Tensor:
        """The candidates' rows `[C, D]` over cached keys and values, weighted by their plan.

        Raises:
            RuntimeError: The hook has layout "per_candidate", or there is no plan for the request.
        """
        self._refuse_per_candidate()
        if self.layout != "shared_history":
            return super().cached_forward(
                delta_x, num_targets, max_kv_caching_len, kv_caching_lengths
            )
        if self.step is None or self.step.candidates is None:
            raise RuntimeError(
                'cached_forward with an attention_hook of layout "shared_history" needs a plan for '
                "these candidates: call it inside `with model.cached_preferences(...)`"
            )
        u, q, k, v = self._project(delta_x)
        k, v, max_seq_len, seq_offsets = self.construct_full_kv(
            delta_k=k.flatten(1, 2), delta_v=v.flatten(1, 2)
        )
        self.update_kv_cache(
            max_seq_len=max_seq_len,
            seq_offsets=seq_offsets,
            k=k,
            v=v,
            max_kv_caching_len=max_kv_caching_len,
            kv_caching_lengths=kv_caching_lengths,
        )
        attention = hstu_attention(
            q,
            k.view(-1, self._num_heads, self._attention_dim),
            v.view(-1, self._num_heads, self._hidden_dim),
            self.step.candidates.attention_spec(max_seq_len, self._attn_alpha),
        )
        return self._output(attention, u, delta_x)

    def _refuse_per_candidate(self) -> None:
        if self.layout == "per_candidate":
            raise RuntimeError(
                'no cached inference with an attention_hook of layout "per_candidate": there every '
                "candidate has its own history rows, so keys and values cannot be shared. Use "
                'layout="shared_history", or run without the cache'
            )

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u `[L, H * dv]`, q and k `[L, H, d]`, v `[L, H, dv]`."""
        u, q, k, v = hstu_compute_uqvk(
            x=x,
            norm_weight=self._input_norm_weight.to(x.dtype),
            norm_bias=self._input_norm_bias.to(x.dtype),
            norm_eps=_NORM_EPS,
            num_heads=self._num_heads,
            attn_dim=self._attention_dim,
            hidden_dim=self._hidden_dim,
            uvqk_weight=self._uvqk_weight.to(x.dtype),
            uvqk_bias=self._uvqk_beta.to(x.dtype),
            kernel=self.hammer_kernel(),
        )
        return u, q, k, v

    def _output(self, attention: Tensor, u: Tensor, x: Tensor) -> Tensor:
        """The gated output projection and the residual, `[L, D]`."""
        return hstu_compute_output(
            attn=attention.reshape(-1, self._num_heads * self._hidden_dim),
            u=u,
            x=x,
            norm_weight=self._output_norm_weight.to(x.dtype),
            norm_bias=self._output_norm_bias.to(x.dtype),
            norm_eps=_NORM_EPS,
            dropout_ratio=self._output_dropout_ratio,
            output_weight=self._output_weight.to(x.dtype),
            group_norm=self._use_group_norm,
            num_heads=self._num_heads,
            linear_dim=self._hidden_dim,
            training=self.training,
            kernel=self.hammer_kernel(),
            recompute_y_in_backward=self._recompute_y,
            **_OUTPUT_FLAGS,
        )


def _scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Rows `[L, H, d]` times a factor `[L]` without gradient, rounded once."""
    if scale is None:
        return rows
    scaled: Tensor = _ScaleRows.apply(rows, scale.view(-1, 1, 1))
    return scaled


class _ScaleRows(torch.autograd.Function):
    """One kernel each way: no product in float32 is kept, or cast, in between."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.mul(rows, scale, out=torch.empty_like(rows))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return torch.mul(grad, scale, out=torch.empty_like(grad)), None
