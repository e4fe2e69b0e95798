"""Checks of the slots, with the same messages on every host."""

from typing import Any

from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.config.registry import GROUPS
from hpgr_plugin.errors import HpgrError


class SlotError(HpgrError):
    """A slot holds something that the host's model cannot use."""


def check_slot(owner: str, name: str, value: Any, kind: type) -> None:
    """Check that a slot holds a `kind`, or nothing.

    Args:
        owner: The gin name of the model, such as "hpgr.DlrmHSTU".
        name: The slot.
        value: What it holds.
        kind: `str` for a path, else the class or interface of the components.

    Raises:
        SlotError: `value` is neither None nor a `kind`.
    """
    if value is None or isinstance(value, kind):
        return
    entries = (entry for group in GROUPS.values() for entry in group if entry.slot == name)
    takes = "a path" if kind is str else ", ".join(f"@hpgr.{entry.name}()" for entry in entries)
    got = type(value).__name__
    if isinstance(value, type):
        got = f"the class {value.__name__} (write @hpgr.{value.__name__}() with parentheses)"
    raise SlotError(f"{owner}.{name} takes {takes} or None, got {got}")


def check_absolute(owner: str, encoder: TimeAwarePositionalEncoder) -> None:
    """Check the form of time-aware positions on a host whose attention has no bias for them.

    Raises:
        SlotError: The relative form.
    """
    if encoder.form == "relative":
        raise SlotError(
            f"{owner}.positional_encoder takes hpgr.TimeAwarePositionalEncoder.form = 'absolute': "
            "the host's attention has no bias that could carry 'relative'"
        )


def check_width(owner: str, name: str, width: int, *, expected: int, of: str) -> None:
    """Check that the component in a slot has the width of the host's embeddings.

    Args:
        owner: The gin name of the model.
        name: The slot.
        width: `embedding_dim` of the component.
        expected: The width it must have.
        of: Whose width that is, in words.

    Raises:
        SlotError: The widths differ.
    """
    if width != expected:
        raise SlotError(
            f"{owner}.{name} must have the width of {of}: embedding_dim={expected}, "
            f"got embedding_dim={width}"
        )
