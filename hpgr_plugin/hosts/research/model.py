"""The slots of the host's sequential encoders."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from hpgr_plugin.components.attention_hooks import AttentionHook
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.hosts.research.modules import HierarchicalInputPreprocessor
from hpgr_plugin.hosts.research.pretrained import load_pretrained
from hpgr_plugin.hosts.slots import SlotError, check_absolute, check_slot, check_width
from hpgr_plugin.transfer.learning_rates import check_lr_ratio

_NAME = "hpgr.SequentialEncoder"


@dataclass(frozen=True)
class SequentialEncoder:
    """The five slots of the retrieval trainer's encoder.

    Attributes:
        sem: Of the item table's width.
        positional_encoder: Replaces the host's learned positions, of the item table's width.
        attention_hook: Must stay empty here, see Raises.
        pretrained: Path of a hand-over that `hpgr.research_pretrain` wrote.
        inherited_lr_ratio: Factor on the learning rate of the weights that `pretrained` brought.

    Raises:
        SlotError: An attention hook, or a slot that holds something else than it takes.
    """

    sem: SessionEnhancementModule | None = None
    positional_encoder: TimeAwarePositionalEncoder | None = None
    attention_hook: AttentionHook | None = None
    pretrained: str | None = None
    inherited_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        check_slot(_NAME, "sem", self.sem, SessionEnhancementModule)
        check_slot(_NAME, "positional_encoder", self.positional_encoder, TimeAwarePositionalEncoder)
        check_slot(_NAME, "pretrained", self.pretrained, str)
        check_lr_ratio(self.inherited_lr_ratio)
        if self.attention_hook is not None:
            raise SlotError(
                f"{_NAME}.attention_hook must stay empty in the retrieval trainer, got a "
                f"{type(self.attention_hook).__name__}: the trainer encodes a history once and "
                "compares the result with all items, so there is no candidate that could prefer "
                "some of the history. The ranking trainer has candidates: "
                "hpgr_plugin.hosts.dlrm_v3"
            )

    def fill(self, encoder: Any) -> None:
        """Put the slots into an encoder that the host has built.

        Not earlier, because the host's constructors re-initialise every matrix they find. With all
        slots empty the encoder stays as it is.

        Args:
            encoder: HSTU or SASRec of the host.

        Raises:
            SlotError: A component of another width.
            HpgrError: A SEM with `causal=False`; here it takes the causal form.
            FileNotFoundError: There is no file at `pretrained`.
            HandoffError: It is not a hand-over for this encoder.
        """
        table: nn.Embedding = encoder._embedding_module._item_emb
        self._check_widths(table.embedding_dim)
        if self.sem is not None or self.positional_encoder is not None:
            encoder._input_features_preproc = HierarchicalInputPreprocessor(
                encoder._input_features_preproc,
                sem=self.sem,
                positional_encoder=self.positional_encoder,
            )
        if self.pretrained is not None:
            load_pretrained(
                self.pretrained,
                table=table,
                sem=self.sem,
                inherited_lr_ratio=self.inherited_lr_ratio,
            )

    def _check_widths(self, expected: int) -> None:
        of = "the item table (train_fn.item_embedding_dim)"
        if self.sem is not None:
            check_width(_NAME, "sem", self.sem.embedding_dim, expected=expected, of=of)
        if self.positional_encoder is not None:
            check_absolute(_NAME, self.positional_encoder)
            width = self.positional_encoder.embedding_dim
            check_width(_NAME, "positional_encoder", width, expected=expected, of=of)
