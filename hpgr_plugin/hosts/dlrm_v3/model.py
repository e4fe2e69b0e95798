"""The host's ranking model with the slots of HPGR."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from generative_recommenders.modules import dlrm_hstu as host

from hpgr_plugin.components.attention_hooks import (
    AttentionHook,
    HookInputs,
    PreferenceGuidedSparseAttention,
)
from hpgr_plugin.components.checks import check_choice
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionContext, SessionEnhancementModule
from hpgr_plugin.hosts.dlrm_v3.attention import PreferenceSTULayer, StepAttention
from hpgr_plugin.hosts.dlrm_v3.cached import cached_candidates
from hpgr_plugin.hosts.dlrm_v3.captured_passes import CapturedPasses
from hpgr_plugin.hosts.dlrm_v3.checks import TimesCheck
from hpgr_plugin.hosts.dlrm_v3.config_fields import set_fields, set_table_fields
from hpgr_plugin.hosts.dlrm_v3.features import CANDIDATE_IDS, HISTORY_IDS, Features
from hpgr_plugin.hosts.dlrm_v3.fused import FusedLayers, Layers
from hpgr_plugin.hosts.dlrm_v3.modules import PreferenceTransducer, SessionPreprocessor
from hpgr_plugin.hosts.dlrm_v3.positions import (
    PlacedHSTUPositionalEncoder,
    TimeAwareHSTUPositionalEncoder,
)
from hpgr_plugin.hosts.dlrm_v3.pretrained import Pretrained
from hpgr_plugin.hosts.dlrm_v3.request import Request, request_of
from hpgr_plugin.hosts.dlrm_v3.selection import RankingBatch, shortened
from hpgr_plugin.hosts.dlrm_v3.tracing import refuse_jit_trace
from hpgr_plugin.hosts.seams import bound_value, host_has_seam, is_bound, replaced
from hpgr_plugin.hosts.slots import SlotError, check_absolute, check_slot, check_width
from hpgr_plugin.ops.preference_plan import PreferencePlan
from hpgr_plugin.transfer.handoff import load_sem_state
from hpgr_plugin.transfer.learning_rates import check_lr_ratio, mark_inherited

_NAME = "hpgr.DlrmHSTU"
_WHY_CAUSAL = f"{_NAME}.hide_future is True: a history may reach past a candidate's time"
_TICKS_PER_SECOND = {"s": 1, "ms": 1000}
_CHECKPOINT_PATHS = ("load_dmp_checkpoint.path", "load_nonsparse_checkpoint.path")
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
        capture: Whether training steps with a plan replay the transducer from CUDA graphs where its
            layers are fused. It saves launches, and takes memory for every size of a batch. The
            log says once what keeps passes from it.
        model_config: Fields of the host's `DlrmHSTUConfig` to set, by name.
        table_config: Fields of an embedding table's `EmbeddingConfig` to set, by table and name.
            As with `model_config`, the objects handed in are changed, because the host's data
            loaders read them too.

    Raises:
        SlotError: A slot holds something else, or a component of another width.
        HpgrError: A SEM with `causal=False` although `hide_future` is True, or a choice, field or
            table that does not exist.
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
        capture: bool = True,
        model_config: Mapping[str, Any] | None = None,
        table_config: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        set_fields(f"{_NAME}.model_config", hstu_configs, model_config or {})
        set_table_fields(f"{_NAME}.table_config", embedding_tables, table_config or {})
        check_slot(_NAME, "sem", sem, SessionEnhancementModule)
        check_slot(_NAME, "positional_encoder", positional_encoder, TimeAwarePositionalEncoder)
        check_slot(_NAME, "attention_hook", attention_hook, AttentionHook)
        check_slot(_NAME, "pretrained", pretrained, str)
        check_lr_ratio(inherited_lr_ratio)
        if layers is not None:
            check_choice(get_args(Layers), **{f"{_NAME}.layers": layers})
        if time_unit is not None:
            check_choice(tuple(_TICKS_PER_SECOND), **{f"{_NAME}.time_unit": time_unit})
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
        self.features = Features(hstu_configs)
        if hide_future is None:
            hide_future = positional_encoder is None or positional_encoder.hide_future
        self._hide_future = hide_future
        self._masks_future = hide_future and hooked
        self._ticks_per_second = _TICKS_PER_SECOND[time_unit or _unit_of_the_host_reader()]
        self._check_times = TimesCheck(
            self.features,
            owner=_NAME,
            ticks_per_second=self._ticks_per_second,
            hides_future=self._masks_future,
            max_blind_share=max_blind_share,
        )
        if isinstance(self._hstu_transducer, PreferenceTransducer):
            self._hstu_transducer.contextual_seq_len = self.features.contextual_len
            self._hstu_transducer.layers = FusedLayers(
                self._hstu_transducer._stu_module,
                layers,
                binding=f"{_NAME}.layers",
            )
            if capture:
                self._hstu_transducer.captured = CapturedPasses(
                    self.features, binding=f"{_NAME}.capture"
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
    def cached_preferences(self, **inputs: Any) -> Iterator[None]:
        """Candidates scored inside by the STU layers' `cached_forward` follow the hook's plan.

        Args:
            **inputs: See `cached_candidates`, without `contextual_len`.

        Raises:
            RuntimeError: The hook's layout is not "shared_history".
        """
        rows = cached_candidates(
            self.attention_hook, contextual_len=self._hstu_transducer.contextual_seq_len, **inputs
        )
        with self._hstu_transducer.attending(StepAttention(candidates=rows)):
            yield

    def preprocess(self, uih_features: Any, candidates_features: Any) -> Any:
        """As the host's; for a frozen table the item ids are added to the payloads."""
        outputs = super().preprocess(uih_features, candidates_features)
        hook = _frozen(self.attention_hook)
        if hook is not None and hook.frozen_table is not None:
            payloads, last = outputs[1], len(hook.frozen_table) - 1
            history, candidates = self.features.items
            payloads[HISTORY_IDS] = uih_features[history].values().clamp(max=last)
            payloads[CANDIDATE_IDS] = candidates_features[candidates].values().clamp(max=last)
        return outputs

    def main_forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's, on what the batch's plan keeps of the histories."""
        batch = RankingBatch(*args, **kwargs)
        transducer = self._hstu_transducer
        has_request = isinstance(transducer, PreferenceTransducer)
        if self.sem is not None or has_request:
            refuse_jit_trace(_NAME)
            positions = transducer._positional_encoder
            self._check_times(
                batch,
                needs_order=self.sem is not None
                or isinstance(positions, TimeAwareHSTUPositionalEncoder),
                gap_seconds=None if self.sem is None else self.sem.gap_seconds,
            )
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
        history, candidates = self.features.items
        times, query_times = self.features.times(batch)
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
                history_ids=batch.payload_features.get(HISTORY_IDS),
                candidate_ids=batch.payload_features.get(CANDIDATE_IDS),
                max_history=batch.max_uih_len,
                max_candidates=batch.max_num_candidates,
            )
        )

    def _follow_plan(self, batch: RankingBatch) -> tuple[Request, RankingBatch]:
        """What the transducer should do, and the batch that the host should see."""
        request, kept = request_of(
            batch,
            self._plan(batch),
            self.features,
            encoder=self._hstu_transducer._positional_encoder,
            hook=self.attention_hook,
            hide_future=self._masks_future,
        )
        if self.sem is not None and request.plan is not None:
            context = self._session_context(self.sem, batch)
            context = context if kept is None else context.of_rows(kept.rows)
            request = dataclasses.replace(request, context=context)
        if kept is None:
            return request, batch
        return request, shortened(
            batch,
            kept,
            history_features=self.features.of_history,
            min_lengths=self.features.min_lengths,
            read_whole=request.context is not None,
        )

    def _session_context(
        self, sem: SessionEnhancementModule, batch: RankingBatch
    ) -> SessionContext:
        """SEM's, of the full histories."""
        embeddings = batch.seq_embeddings[self.features.items[0]].embedding
        half = self._bf16_training and not self.is_inference
        times = self.features.times(batch)[0]
        # As the host hands embeddings to its transducer.
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
            context: SessionContext = sem.context(
                embeddings.to(torch.bfloat16 if half else embeddings.dtype),
                batch.history_offsets,
                times // self._ticks_per_second,
            )
        return context

    def _fill_attention_hook(self, hook: AttentionHook | None) -> None:
        self.attention_hook = hook
        if hook is None:
            return
        config = self._hstu_configs
        hook.decide_layout(max_history=config.max_seq_len, max_candidates=config.max_num_candidates)
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
            contextual_seq_len=self.features.contextual_len,
            is_inference=is_inference,
        )

    def _fill_sem(self, sem: SessionEnhancementModule) -> None:
        width = self._hstu_configs.hstu_embedding_table_dim
        check_width(_NAME, "sem", sem.embedding_dim, expected=width, of="the item table")
        sem.refuse_tokens(_NAME)
        if self._hide_future:  # a history may then reach past a candidate's own time
            sem.decide_causal(True, _WHY_CAUSAL)
        transducer = self._hstu_transducer
        transducer._input_preprocessor = SessionPreprocessor(
            transducer._input_preprocessor, sem, ticks_per_second=self._ticks_per_second
        )

    def _inherit(self, path: str, tables: dict[str, Any], lr_ratio: float) -> None:
        feature, _ = self.features.items
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
