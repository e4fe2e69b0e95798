"""The slots of the retrieval trainer's encoder."""

from __future__ import annotations

from typing import Any

import gin
from torch import nn

from hpgr_plugin.components.attention_hooks import AttentionHook
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.hosts.research.modules import HierarchicalInputPreprocessor
from hpgr_plugin.hosts.research.pretrained import load_pretrained


@gin.configurable("SequentialEncoder", module="hpgr")
def fill_slots(
    encoder: Any,
    *,
    sem: SessionEnhancementModule | None = None,
    positional_encoder: TimeAwarePositionalEncoder | None = None,
    attention_hook: AttentionHook | None = None,
    pretrained: str | None = None,
    inherited_lr_ratio: float = 0.1,
) -> Any:
    """Put what the slots hold into an encoder that the host has built.

    After the host built it, because its constructors re-initialise every matrix they find. With
    all slots empty the encoder is the host's own, untouched.

    Args:
        encoder: HSTU or SASRec of the host.
        sem: causal form, of the item table's width.
        positional_encoder: in place of the host's learned positions, of the same width.
        attention_hook: has to stay empty here; see Raises.
        pretrained: path of a hand-over that `hpgr.research_pretrain` wrote.
        inherited_lr_ratio: factor on the learning rate of what `pretrained` brings.

    Raises:
        ValueError: a hook; a slot of another width; a SEM that is not causal.
        FileNotFoundError, HandoffError: from the hand-over.
    """
    if attention_hook is not None:
        raise ValueError(
            f"attention_hook must stay empty in the retrieval trainer, got a "
            f"{type(attention_hook).__name__}: it encodes a history once and compares the result "
            "with all items, so there is no candidate that could prefer some of the history. The "
            "ranking trainer has candidates: hpgr_plugin.hosts.dlrm_v3"
        )
    table: nn.Embedding = encoder._embedding_module._item_emb
    for name, width in (
        ("sem", sem and sem.embedding_dim),
        ("positional_encoder", positional_encoder and positional_encoder.table.embedding_dim),
    ):
        if width is not None and width != table.embedding_dim:
            raise ValueError(
                f"{name} must have embedding_dim {table.embedding_dim} "
                f"(train_fn.item_embedding_dim), got {width}"
            )
    if sem is not None or positional_encoder is not None:
        encoder._input_features_preproc = HierarchicalInputPreprocessor(
            encoder._input_features_preproc, sem=sem, positional_encoder=positional_encoder
        )
    if pretrained is not None:
        load_pretrained(pretrained, table=table, sem=sem, inherited_lr_ratio=inherited_lr_ratio)
    return encoder
