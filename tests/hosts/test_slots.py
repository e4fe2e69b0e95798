"""The checks of slots that all hosts share."""

from typing import Any

import pytest

from hpgr_plugin.components.attention_hooks import AttentionHook, StochasticLength
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.hosts.slots import SlotError, check_absolute, check_slot, check_width

OWNER = "hpgr.DlrmHSTU"


def test_nothing_and_the_right_kind_pass() -> None:
    check_slot(OWNER, "sem", None, SessionEnhancementModule)
    check_slot(OWNER, "sem", SessionEnhancementModule(embedding_dim=8), SessionEnhancementModule)
    check_slot(OWNER, "attention_hook", StochasticLength(alpha=1.5), AttentionHook)
    check_slot(OWNER, "pretrained", "stage1.safetensors", str)
    check_width(OWNER, "sem", 8, expected=8, of="the item table")


@pytest.mark.parametrize(
    ("name", "value", "kind", "message"),
    [
        (
            "sem",
            5,
            SessionEnhancementModule,
            "takes @hpgr.SessionEnhancementModule() or None, got int",
        ),
        ("sem", SessionEnhancementModule, SessionEnhancementModule, "with parentheses"),
        ("attention_hook", "PGSA", AttentionHook, "@hpgr.PreferenceGuidedSparseAttention(), "),
        ("pretrained", 5, str, "takes a path or None, got int"),
    ],
)
def test_anything_else_is_one_line_that_names_the_slot(
    name: str, value: Any, kind: type, message: str
) -> None:
    with pytest.raises(SlotError) as raised:
        check_slot(OWNER, name, value, kind)
    assert str(raised.value).startswith(f"{OWNER}.{name} takes ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_another_width_names_both() -> None:
    with pytest.raises(SlotError, match="embedding_dim=16, got embedding_dim=8"):
        check_width(OWNER, "sem", 8, expected=16, of="the item table")


def test_a_host_without_a_bias_refuses_relative_positions() -> None:
    check_absolute(OWNER, TimeAwarePositionalEncoder(embedding_dim=8, max_positions=9))
    with pytest.raises(SlotError) as raised:
        check_absolute(OWNER, TimeAwarePositionalEncoder(embedding_dim=8, form="relative"))
    assert str(raised.value).startswith(f"{OWNER}.positional_encoder takes ")
    assert "form = 'absolute'" in str(raised.value)
    assert "\n" not in str(raised.value)
