"""The host's ranking model with the slots of HPGR."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from generative_recommenders.modules import dlrm_hstu as host
from torch import Tensor

from hpgr_plugin.components.attention_hooks import (
    AttentionHook,
    HookInputs,
    PreferenceGuidedSparseAttention,
)
from hpgr_plugin.components.checks import check_choice
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder, VisibilityCheck
from hpgr_plugin.components.sem import SessionContext, SessionEnhancementModule
from hpgr_plugin.components.sessions import check_time_unit
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3.attention import CandidateRows, PreferenceSTULayer, StepAttention
from hpgr_plugin.hosts.dlrm_v3.fused import FusedLayers, Layers
from hpgr_plugin.hosts.dlrm_v3.modules import (
    PreferenceTransducer,
    Request,
    SessionPreprocessor,
)
from hpgr_plugin.hosts.dlrm_v3.positions import (
    PlacedHSTUPositionalEncoder,
    TimeAwareHSTUPositionalEncoder,
)
from hpgr_plugin.hosts.dlrm_v3.pretrained import Pretrained
from hpgr_plugin.hosts.dlrm_v3.selection import (
    FullPlaces,
    KeptHistory,
    RankingBatch,
    keep,
    shortened,
)
from hpgr_plugin.hosts.dlrm_v3.tracing import refuse_jit_trace
from hpgr_plugin.hosts.seams import bound_value, host_has_seam, is_bound, replaced
from hpgr_plugin.hosts.slots import SlotError, check_absolute, check_slot, check_width
from hpgr_plugin.ops.compact.parts import SequenceParts, joined_parts
from hpgr_plugin.ops.jagged import check_sorted, complete_cumsum, segment_ids
from hpgr_plugin.ops.preference_plan import PreferencePlan, count_earlier
from hpgr_plugin.transfer.handoff import load_sem_state
from hpgr_plugin.transfer.learning_rates import check_lr_ratio, mark_inherited

_NAME = "hpgr.DlrmHSTU"
_WHY_CAUSAL = f"{_NAME}.hide_future is True: a history may reach past a candidate's time"
_CHECKPOINT_PATHS = ("load_dmp_checkpoint.path", "load_nonsparse_checkpoint.path")
_CHECKED_BATCHES = 10  # the first ones, whose times are checked
_HISTORY_IDS = "hpgr_history_ids"
_CANDIDATE_IDS = "hpgr_candidate_ids"
_MIN_LENGTHS = "_contextual_feature_to_min_uih_length"  # an attribute of the host's preprocessor


class DlrmHSTU(host.DlrmHSTU):
    """The host's `DlrmHSTU` with five slots; with all of them empty it is the host's own model.

    Args:
        hstu_configs: The host's argument, as are the next four.
        embedding_tables: See the host.
        is_inference: See the host.
        is_dense: See the host.
        bf16_training: See the host.
        sem: Enriches the history rows of the raw item embeddings; of the item table's width. It
            takes the causal form, unless `hide_future` is False.
        positional_encoder: Replaces the host's, time buckets included; of the transducer's width.
        attention_hook: PGSA or stochastic length.
        pretrained: Path of a stage-1 hand-over. Its item table goes to the table of the history's
            item feature, its SEM weights to `sem`.
        inherited_lr_ratio: Factor on the learning rate of the weights that `pretrained` brought.
        hide_future: Whether history at or after a candidate's query time is hidden from that
            candidate. None: as `positional_encoder` says, True without one. Bind False for data
            without real query times: the host's MovieLens reader gives all candidates the time of
            the last history item, which hides at least that item from them.
        time_unit: Of the history's times, "s" or "ms", for the session gap of `sem`. None: the
            unit of the host's own readers, which is "ms" for its KuaiRand data sets and "s" for
            the others.
        max_blind_share: Of the candidates that have a history, the share that may see nothing of it
            in the first batches because of `hide_future`.
        layers: What runs the STU layers, with the host's parameters in either case: "host", the
            host's kernels, or "fused", those of this package, which compute only the candidates in
            the last layer. None: "fused" where its Triton kernels can run the step and a slot
            changes the attention or the positions, else "host"; the log says once which.
        capture: Whether fused layers over short sequences, one per candidate, run as CUDA graphs.
            It saves launches, and takes memory for every size of a batch.
        model_config: Fields of the host's `DlrmHSTUConfig` to set, by name.
        table_config: Fields of an embedding table's `EmbeddingConfig` to set, by table and name.
            As with `model_config`, the objects handed in are changed, because the host's data
            loaders read them too.

    Raises:
        SlotError: A slot holds something else, or a component of another width.
        HpgrError: A SEM with `causal=False` although `hide_future` is True.
        ValueError: An unknown field or table.
    """

    def __init__(
        self,
        hstu_configs: Any,
        embedding_tables: dict[str, Any],
        is_inference: bool,
        is_dense: bool = False,
        bf16_training: bool = True,
        *,
        sem: SessionEnhancementModule | None = None,
        positional_encoder: TimeAwarePositionalEncoder | None = None,
        attention_hook: AttentionHook | None = None,
        pretrained: str | None = None,
        inherited_lr_ratio: float = 0.1,
        hide_future: bool | None = None,
        time_unit: Literal["s", "ms"] | None = None,
        max_blind_share: float = 0.5,
        layers: Layers | None = None,
        capture: bool = False,
        model_config: Mapping[str, Any] | None = None,
        table_config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        _set_fields("model_config", hstu_configs, model_config or {})
        _set_table_fields(embedding_tables, table_config or {})
        check_slot(_NAME, "sem", sem, SessionEnhancementModule)
        check_slot(_NAME, "positional_encoder", positional_encoder, TimeAwarePositionalEncoder)
        check_slot(_NAME, "attention_hook", attention_hook, AttentionHook)
        check_slot(_NAME, "pretrained", pretrained, str)
        check_lr_ratio(inherited_lr_ratio)
        if layers is not None:
            check_choice(get_args(Layers), **{f"{_NAME}.layers": layers})
        hooked = attention_hook is not None or positional_encoder is not None
        with _classes_of_this_model(hooked or layers == "fused"):
            super().__init__(
                hstu_configs=hstu_configs,
                embedding_tables=embedding_tables,
                is_inference=is_inference,
                is_dense=is_dense,
                bf16_training=bf16_training,
            )
        # Slots are filled after the host's constructor: it initialises every Linear it finds.
        if hide_future is None:
            hide_future = positional_encoder is None or positional_encoder.hide_future
        self._hide_future = hide_future
        self._masks_future = hide_future and hooked
        self._ticks_per_second = {"s": 1, "ms": 1000}[time_unit or _unit_of_the_host_reader()]
        self._unchecked_batches = _CHECKED_BATCHES
        self._visibility = VisibilityCheck(
            times=f"the feature {hstu_configs.candidates_querytime_feature_name!r}",
            binding=f"{_NAME}.hide_future = False",
            max_blind_share=max_blind_share,
            batches=_CHECKED_BATCHES,
        )
        if isinstance(self._hstu_transducer, PreferenceTransducer):
            self._hstu_transducer.contextual_seq_len = self._contextual_seq_len()
            self._hstu_transducer.layers = FusedLayers(
                self._hstu_transducer._stu_module,
                layers,
                binding=f"{_NAME}.layers",
                capture=capture,
            )
        self._fill_attention_hook(attention_hook)
        if positional_encoder is not None:
            self._fill_positional_encoder(positional_encoder, is_inference)
        if sem is not None:
            self._fill_sem(sem)
        self._pretrained: Pretrained | None = None
        if pretrained is not None:
            self._inherit(pretrained, embedding_tables, inherited_lr_ratio)
        if sem is not None:
            sem.decide_causal(self._hide_future, _WHY_CAUSAL)
        frozen = _frozen(attention_hook)
        restored = any(map(is_bound, _CHECKPOINT_PATHS))
        if frozen is not None and frozen.frozen_table is None and not restored:
            raise SlotError(
                f'{_NAME}.attention_hook with table="frozen" needs pretrained, got None (or a '
                f"checkpoint to restore: {_CHECKPOINT_PATHS[0]})"
            )

    @property
    def sem(self) -> SessionEnhancementModule | None:
        """The session enhancement module in the slot, or None."""
        preprocessor = self._hstu_transducer._input_preprocessor
        return preprocessor.sem if isinstance(preprocessor, SessionPreprocessor) else None

    def load_pretrained(self) -> None:
        """Copy the item rows of the hand-over into the embedding collection, sharded or not.

        The host builds its tables on the `meta` device; call this once they are materialised. In
        the host's trainer the adapter calls it as soon as the tables are sharded.

        Raises:
            RuntimeError: The tables are still on the `meta` device.
        """
        if self._pretrained is not None and hasattr(self, "_embedding_collection"):
            self._pretrained.load_into(self._embedding_collection)

    def after_sharding(self) -> None:
        """Load the hand-over; called between sharding and the restoring of a checkpoint."""
        self.load_pretrained()

    @contextlib.contextmanager
    def cached_preferences(
        self,
        *,
        history_embeddings: Tensor,
        candidate_embeddings: Tensor,
        history_lengths: Tensor,
        num_candidates: Tensor,
        history_timestamps: Tensor | None = None,
        candidate_timestamps: Tensor | None = None,
        cached_lengths: Tensor | None = None,
        **ids: Tensor,
    ) -> Iterator[None]:
        """Candidates scored inside by the STU layers' `cached_forward` follow the hook's plan.

        Args:
            history_embeddings: Raw rows of the item table `[T, D]`.
            candidate_embeddings: Raw rows of the item table `[C, D]`.
            history_lengths: `[B]`.
            num_candidates: Rows that `cached_forward` gets for each user `[B]`, all equal.
            history_timestamps: `[T]` seconds.
            candidate_timestamps: `[C]` seconds.
            cached_lengths: Rows in the cache `[B]`; None: contextual tokens and history.
            **ids: `history_ids` and `candidate_ids` for a hook with table="frozen".

        Raises:
            RuntimeError: The hook's layout is not "shared_history".
        """
        hook = self.attention_hook
        if hook is None or hook.layout != "shared_history":
            layout = None if hook is None else hook.layout
            raise RuntimeError(
                'cached_preferences needs an attention_hook of layout "shared_history", got '
                f"{'no hook' if hook is None else f'layout {layout!r}'}"
            )
        contextual_seq_len = self._hstu_transducer.contextual_seq_len
        if cached_lengths is None:
            cached_lengths = history_lengths + contextual_seq_len
        parts = SequenceParts(
            seq_offsets=complete_cumsum((cached_lengths + num_candidates).long()),
            history_offsets=complete_cumsum(history_lengths.long()),
            candidate_offsets=complete_cumsum(num_candidates.long()),
            contextual_len=contextual_seq_len,
            num_history=len(history_embeddings),
            num_candidates=len(candidate_embeddings),
        )
        plan = hook.plan(
            HookInputs(
                history_embeddings,
                candidate_embeddings,
                parts.history_offsets,
                parts.candidate_offsets,
                history_timestamps,
                candidate_timestamps,
                ids.get("history_ids"),
                ids.get("candidate_ids"),
            )
        )
        assert plan is not None
        rows = CandidateRows(parts, plan, hook.mask_position)
        with self._hstu_transducer.attending(StepAttention(candidates=rows)):
            yield

    def preprocess(self, uih_features: Any, candidates_features: Any) -> Any:
        """As the host's; for a frozen table the item ids are added to the payloads."""
        outputs = super().preprocess(uih_features, candidates_features)
        hook = _frozen(self.attention_hook)
        if hook is not None and hook.frozen_table is not None:
            payloads, last = outputs[1], len(hook.frozen_table) - 1
            history, candidates = self._item_features()
            payloads[_HISTORY_IDS] = uih_features[history].values().clamp(max=last)
            payloads[_CANDIDATE_IDS] = candidates_features[candidates].values().clamp(max=last)
        return outputs

    def main_forward(
        self,
        seq_embeddings: dict[str, Any],
        payload_features: dict[str, Tensor],
        max_uih_len: int,
        uih_seq_lengths: Tensor,
        max_num_candidates: int,
        num_candidates: Tensor,
    ) -> Any:
        """As the host's, on what the batch's plan keeps of the histories."""
        batch = RankingBatch(
            seq_embeddings,
            payload_features,
            max_uih_len,
            uih_seq_lengths,
            max_num_candidates,
            num_candidates,
        )
        transducer = self._hstu_transducer
        has_request = isinstance(transducer, PreferenceTransducer)
        if self.sem is not None or has_request:
            refuse_jit_trace(_NAME)
            self._check_times(batch)
        if not has_request:
            return super().main_forward(**batch._asdict())
        request, batch = self._follow_plan(batch)
        preprocessor: Any = transducer._input_preprocessor
        if isinstance(preprocessor, SessionPreprocessor):
            preprocessor = preprocessor._preprocessor
        # `shortened` has compared with the full lengths already.
        compared: dict[str, Any] = {} if request.full_length is None else {_MIN_LENGTHS: {}}
        with transducer.requested(request), replaced(preprocessor, **compared):
            return super().main_forward(**batch._asdict())

    def _plan(self, batch: RankingBatch) -> PreferencePlan | None:
        """What the hook keeps of the histories; None for all."""
        hook = self.attention_hook
        if hook is None:
            return None
        history, candidates = self._item_features()
        times, query_times = self._times(batch)
        # Times hide the future from candidates; a plan of users may weigh items by age with them.
        has_times = self._hide_future or hook.layout == "per_user"
        return hook.plan(
            HookInputs(
                batch.seq_embeddings[history].embedding.detach(),
                batch.seq_embeddings[candidates].embedding.detach(),
                batch.history_offsets,
                batch.candidate_offsets,
                times if has_times else None,
                query_times if has_times else None,
                history_ids=batch.payload_features.get(_HISTORY_IDS),
                candidate_ids=batch.payload_features.get(_CANDIDATE_IDS),
                max_history=batch.max_uih_len,
                max_candidates=batch.max_num_candidates,
            )
        )

    def _follow_plan(self, batch: RankingBatch) -> tuple[Request, RankingBatch]:
        """What the transducer should do, and the batch that the host should see."""
        plan, hook = self._plan(batch), self.attention_hook
        if plan is not None and hook is not None and hook.layout != "shared_history":
            return self._shorten(batch, plan, hook)
        parts = self._parts(batch, batch.history_offsets, len(self._times(batch)[0]))
        request = Request(
            parts,
            plan,
            batch.max_num_candidates,
            mask_position="post" if hook is None else hook.mask_position,
            hide_future=self._masks_future,
            places=self._places(batch, parts, None),
        )
        return request, batch

    def _shorten(
        self, batch: RankingBatch, plan: PreferencePlan, hook: AttentionHook
    ) -> tuple[Request, RankingBatch]:
        """The same for a plan that leaves history items out."""
        longest_row = hook.longest_row(plan, batch.max_uih_len)
        kept = keep(
            plan,
            batch.history_offsets,
            num_history=len(self._times(batch)[0]),
            max_history=batch.max_uih_len,
            longest_row=longest_row,
            by_user=hook.layout == "per_user" or self._one_candidate_each(batch),
        )
        parts = self._parts(batch, kept.offsets, len(kept.rows))
        request = Request(
            parts,
            kept.plan,
            batch.max_num_candidates,
            hook.layout,
            hook.mask_position,
            self._hide_future,
            by_user=kept.by_user,
            full_length=batch.max_uih_len + batch.max_num_candidates + parts.contextual_len,
            longest_row=longest_row,
            places=self._places(batch, parts, kept),
            context=self._session_context(batch, kept),
        )
        features = [name for name, _ in self._hstu_configs.merge_uih_candidate_feature_mapping]
        return request, shortened(
            batch, kept, history_features=features, min_lengths=self._min_lengths()
        )

    def _parts(
        self, batch: RankingBatch, history_offsets: Tensor, num_history: int
    ) -> SequenceParts:
        """Of the sequences with these histories and the batch's candidates."""
        return joined_parts(
            history_offsets,
            batch.candidate_offsets,
            contextual_len=self._contextual_seq_len(),
            num_history=num_history,
            num_candidates=len(self._times(batch)[1]),
            one_candidate_each=self._one_candidate_each(batch),
        )

    def _one_candidate_each(self, batch: RankingBatch) -> bool:
        """Whether every user has exactly one candidate, as far as is known without a wait."""
        one_at_most = batch.max_num_candidates == 1
        return one_at_most and len(self._times(batch)[1]) == len(batch.num_candidates)

    def _places(
        self, batch: RankingBatch, parts: SequenceParts, kept: KeptHistory | None
    ) -> FullPlaces | None:
        """Where the rows are in the full sequences; None: the encoder finds it by itself."""
        encoder = self._hstu_transducer._positional_encoder
        is_time_aware = isinstance(encoder, TimeAwareHSTUPositionalEncoder)
        if kept is None and not is_time_aware:
            return None
        offsets = batch.history_offsets.long()
        times, query_times = self._times(batch)
        rows = torch.arange(len(times), device=times.device) if kept is None else kept.rows
        if not is_time_aware:
            return FullPlaces(parts, rows, offsets)
        table = encoder.encoder
        shared = not table.hide_future and batch.max_num_candidates > 1
        if shared or batch.max_uih_len + 1 > (table.max_positions or 0):
            table.check_lengths(offsets, batch.candidate_offsets)
        earlier = count_earlier(
            times,
            offsets,
            query_times,
            batch.candidate_offsets,
            max_history=batch.max_uih_len,
            max_candidates=batch.max_num_candidates,
        )
        return FullPlaces(parts, rows, offsets, earlier)

    def _session_context(self, batch: RankingBatch, kept: KeptHistory) -> SessionContext | None:
        """SEM's, of the full histories, for the kept rows."""
        if self.sem is None:
            return None
        embeddings = batch.seq_embeddings[self._item_features()[0]].embedding
        half = self._bf16_training and not self.is_inference
        times = self._times(batch)[0]
        # As the host hands embeddings to its transducer.
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            context = self.sem.context(
                embeddings.to(torch.bfloat16 if half else embeddings.dtype),
                batch.history_offsets,
                times // self._ticks_per_second,
            )
        return context.of_rows(kept.rows)

    def _min_lengths(self) -> dict[str, int]:
        """Contextual features that count from a length of the sequence on."""
        config = self._hstu_configs
        least = config.contextual_feature_to_min_uih_length
        return {n: least[n] for n in config.contextual_feature_to_max_length if least.get(n, 0) > 0}

    def _check_times(self, batch: RankingBatch) -> None:
        """Check the times of the first batches, which the host's readers do not always provide.

        Where that costs no wait for the device, the order is checked in all of them. Warns if the
        times do not look like seconds, as milliseconds do not.

        Raises:
            HpgrError: A history is out of order although a slot needs its order, or too many
                candidates see nothing of their history.
        """
        first = self._unchecked_batches
        self._unchecked_batches = max(0, first - 1)
        times, query_times = self._times(batch)
        offsets = batch.history_offsets
        if first or not times.is_cuda:
            self._check_order(times, offsets)
        if first == _CHECKED_BATCHES and self.sem is not None:
            seconds = times // self._ticks_per_second
            check_time_unit(seconds, offsets, self.sem.gap_seconds, f"{_NAME}.time_unit")
        if first and self._masks_future:
            candidates = batch.candidate_offsets
            visible = count_earlier(
                times,
                offsets,
                query_times,
                candidates,
                max_history=batch.max_uih_len,
                max_candidates=batch.max_num_candidates,
            )
            users = segment_ids(candidates, len(query_times))
            self._visibility(visible, offsets.diff()[users])

    def _check_order(self, times: Tensor, offsets: Tensor) -> None:
        """Where a slot needs it, every history must be in order."""
        name = self._hstu_configs.uih_action_time_feature_name
        positions = self._hstu_transducer._positional_encoder
        if self.sem is None and not isinstance(positions, TimeAwareHSTUPositionalEncoder):
            return
        try:
            check_sorted(times, offsets, name)
        except ValueError as error:
            raise HpgrError(
                f"{error}. The slots sem and positional_encoder need histories in order of "
                f"{name!r}, and the reader of this data set does not give them so (the host's "
                "debug data set is random): sort every history, or leave these slots empty"
            ) from error

    def _times(self, batch: RankingBatch) -> tuple[Tensor, Tensor]:
        """Times of the history items `[T]` and of the candidates `[C]`."""
        config = self._hstu_configs
        return (
            batch.payload_features[config.uih_action_time_feature_name],
            batch.payload_features[config.candidates_querytime_feature_name],
        )

    def _contextual_seq_len(self) -> int:
        """Tokens in front of every history."""
        return sum(self._hstu_configs.contextual_feature_to_max_length.values())

    def _fill_attention_hook(self, hook: AttentionHook | None) -> None:
        self.attention_hook = hook
        if hook is None:
            return
        config = self._hstu_configs
        hook.decide_layout(
            max_history=config.max_seq_len,
            max_candidates=config.max_num_candidates,
            device_type="cuda" if torch.cuda.is_available() else "cpu",
        )
        self.tell_layers_the_layout()
        self.register_load_state_dict_post_hook(_after_loading)

    def tell_layers_the_layout(self) -> None:
        """The layers' cached inference depends on the hook's layout."""
        assert self.attention_hook is not None
        for layer in self._hstu_transducer.modules():
            if isinstance(layer, PreferenceSTULayer):
                layer.layout = self.attention_hook.layout

    def _fill_positional_encoder(
        self, encoder: TimeAwarePositionalEncoder, is_inference: bool
    ) -> None:
        width = self._hstu_configs.hstu_transducer_embedding_dim
        check_absolute(_NAME, encoder)
        given = encoder.embedding_dim
        check_width(_NAME, "positional_encoder", given, expected=width, of="the transducer")
        self._hstu_transducer._positional_encoder = TimeAwareHSTUPositionalEncoder(
            encoder,
            embedding_dim=width,
            contextual_seq_len=self._contextual_seq_len(),
            is_inference=is_inference,
        )

    def _fill_sem(self, sem: SessionEnhancementModule) -> None:
        width = self._hstu_configs.hstu_embedding_table_dim
        check_width(_NAME, "sem", sem.embedding_dim, expected=width, of="the item table")
        if self._hide_future:  # a history may then reach past a candidate's own time
            sem.decide_causal(True, _WHY_CAUSAL)
        transducer = self._hstu_transducer
        transducer._input_preprocessor = SessionPreprocessor(
            transducer._input_preprocessor, sem, ticks_per_second=self._ticks_per_second
        )

    def _item_features(self) -> tuple[str, str]:
        """Names of the item feature in the history and in the candidates."""
        history = self._hstu_configs.uih_post_id_feature_name
        mapping = dict(self._hstu_configs.merge_uih_candidate_feature_mapping)
        return history, mapping[history]

    def _inherit(self, path: str, tables: dict[str, Any], lr_ratio: float) -> None:
        feature, _ = self._item_features()
        name = next(n for n, table in tables.items() if feature in table.feature_names)
        self._pretrained = Pretrained.open(
            path,
            table_name=tables[name].name,
            num_embeddings=tables[name].num_embeddings,
            width=tables[name].embedding_dim,
        )
        if self.sem is not None and self._pretrained.handoff.sem_state is not None:
            load_sem_state(self.sem, self._pretrained.handoff)
            mark_inherited(self.sem.parameters(), lr_ratio)
        if hasattr(self, "_embedding_collection"):
            table = self._embedding_collection.embeddings[self._pretrained.table_name]
            mark_inherited(table.parameters(), lr_ratio)
        hook = _frozen(self.attention_hook)
        if hook is not None:
            hook.freeze(self._pretrained.table_by_id())


def _unit_of_the_host_reader() -> str:
    """The time unit of the data set that the configuration names."""
    return "ms" if "kuairand" in str(bound_value("make_model.dataset")) else "s"


def _frozen(hook: AttentionHook | None) -> PreferenceGuidedSparseAttention | None:
    if isinstance(hook, PreferenceGuidedSparseAttention) and hook.table == "frozen":
        return hook
    return None


def _after_loading(model: DlrmHSTU, _: Any) -> None:
    """A checkpoint may bring another layout than the one chosen at first."""
    model.tell_layers_the_layout()


@contextlib.contextmanager
def _classes_of_this_model(needed: bool) -> Iterator[None]:
    """Inside, the host's constructor builds this package's layers and transducer if needed.

    A host with the patch series names its classes as attributes of the model; in others the
    constructor looks them up in its module.
    """
    if not needed:
        yield
        return
    if host_has_seam("dlrm_classes"):
        classes = replaced(
            DlrmHSTU,
            stu_layer_cls=PreferenceSTULayer,
            transducer_cls=PreferenceTransducer,
            positional_encoder_cls=PlacedHSTUPositionalEncoder,
        )
    else:
        classes = replaced(
            host,
            STULayer=PreferenceSTULayer,
            HSTUTransducer=PreferenceTransducer,
            HSTUPositionalEncoder=PlacedHSTUPositionalEncoder,
        )
    with classes:
        yield


def _set_fields(argument: str, config: Any, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if not hasattr(config, name):
            raise ValueError(
                f"{argument} sets {name!r}, which is no field of {type(config).__name__}; "
                f"it has {sorted(vars(config))}"
            )
        setattr(config, name, value)


def _set_table_fields(tables: dict[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> None:
    for table, settings in fields.items():
        if table not in tables:
            raise ValueError(f"table_config names table {table!r}; there are {sorted(tables)}")
        _set_fields(f"table_config[{table!r}]", tables[table], settings)
