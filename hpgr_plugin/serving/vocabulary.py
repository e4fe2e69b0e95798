"""The log's own ids and values, and the codes by which the model knows them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hpgr_plugin.data.log import InteractionLog
from hpgr_plugin.errors import HpgrError

UNKNOWN = -1


class RequestError(HpgrError):
    """A request that cannot be scored.

    Attributes:
        field: of the request, such as "history.times" or "candidates[3]".
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


@dataclass(frozen=True)
class UserFeature:
    """One categorical feature of the users.

    Attributes:
        values: text of code 1, 2 and so on; code 0 is "unknown".
        codes: int32 [U], of the users in the log.
    """

    values: np.ndarray
    codes: np.ndarray

    def code(self, value: Any) -> int:
        """The code of a value, 0 where it is not in the log."""
        if value is None:
            return 0
        found = np.flatnonzero(self.values == str(value))
        return int(found[0]) + 1 if len(found) else 0


@dataclass(frozen=True)
class Vocabulary:
    """What requests may name.

    Attributes:
        item_ids: [V], ascending, integers or text.
        action_values: [A], or None where the log does not know them: actions are then codes.
        num_actions: A.
        user_ids: [U], ascending, integers or text.
        user_features: by name.
    """

    item_ids: np.ndarray
    action_values: np.ndarray | None
    num_actions: int
    user_ids: np.ndarray
    user_features: dict[str, UserFeature] = field(default_factory=dict)

    @classmethod
    def of(cls, log: InteractionLog) -> Vocabulary:
        """The vocabulary of a log."""
        return cls(
            item_ids=np.asarray(log.item_ids),
            action_values=None if log.action_values is None else np.asarray(log.action_values),
            num_actions=log.num_actions,
            user_ids=np.asarray(log.user_ids),
            user_features={
                name: UserFeature(
                    np.zeros(0, np.str_) if feature.values is None else np.asarray(feature.values),
                    np.asarray(feature.codes),
                )
                for name, feature in log.user_features.items()
            },
        )

    def items(self, ids: Sequence[Any], name: str) -> np.ndarray:
        """Codes int64 of item ids, `UNKNOWN` where the log has no such item.

        Raises:
            RequestError: an id of another type than the log's.
        """
        return _codes(self.item_ids, ids, name, table=self._item_table)

    @cached_property
    def _item_table(self) -> np.ndarray | None:
        return _table(self.item_ids)

    def actions(self, values: Sequence[Any], name: str) -> np.ndarray:
        """Codes int64 of actions.

        Raises:
            RequestError: an action that the log does not have.
        """
        code = self._action_codes
        with suppress(KeyError, TypeError):
            return np.fromiter(map(code.__getitem__, values), np.int64, len(values))
        for place, value in enumerate(values):
            try:
                code[value]
            except (KeyError, TypeError):
                shown = ", ".join(map(repr, list(code)[:20]))
                raise RequestError(
                    f"{name}[{place}]", f"takes one of {shown}, got {value!r}"
                ) from None
        raise AssertionError("one of the values has no code")

    @cached_property
    def _action_codes(self) -> dict[Any, int]:
        known: list[Any] = list(range(self.num_actions))
        if self.action_values is not None:
            known = self.action_values.tolist()
        return {value: place for place, value in enumerate(known)}

    def user_feature_codes(
        self, user_id: int | str | None, given: dict[str, Any]
    ) -> dict[str, int]:
        """Codes of all features: of the given values, else those of a known user, else 0.

        Raises:
            RequestError: a feature that the model does not have.
        """
        for name in given:
            if name not in self.user_features:
                known = ", ".join(sorted(self.user_features)) or "none"
                raise RequestError(f"user_features.{name}", f"no such feature; there are: {known}")
        user = UNKNOWN
        if user_id is not None and self.user_features:
            user = int(_codes(self.user_ids, [user_id], "user_id", strict=False)[0])
        codes = {}
        for name, feature in self.user_features.items():
            if name in given:
                codes[name] = feature.code(given[name])
            else:
                codes[name] = 0 if user == UNKNOWN else int(feature.codes[user])
        return codes

    def arrays(self) -> dict[str, np.ndarray]:
        """For `numpy.savez`."""
        arrays = {"item_ids": self.item_ids, "user_ids": self.user_ids}
        arrays["num_actions"] = np.array(self.num_actions)
        if self.action_values is not None:
            arrays["action_values"] = self.action_values
        for name, feature in self.user_features.items():
            arrays[f"user_feature_values.{name}"] = feature.values
            arrays[f"user_feature_codes.{name}"] = feature.codes
        return arrays

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Vocabulary:
        """From `arrays`.

        Raises:
            KeyError: one of them is missing.
        """
        prefix = "user_feature_values."
        names = [name.removeprefix(prefix) for name in arrays if name.startswith(prefix)]
        return cls(
            item_ids=arrays["item_ids"],
            action_values=arrays.get("action_values"),
            num_actions=int(arrays["num_actions"]),
            user_ids=arrays["user_ids"],
            user_features={
                name: UserFeature(arrays[prefix + name], arrays[f"user_feature_codes.{name}"])
                for name in names
            },
        )


_SPARSEST = 16  # integers per id, up to which a table of all of them is kept


def _table(known: np.ndarray) -> np.ndarray | None:
    """The code of every integer from the first id to the last, `UNKNOWN` at the end.

    None where ids are text, or far apart.
    """
    if not np.issubdtype(known.dtype, np.integer) or not len(known):
        return None
    span = int(known[-1]) - int(known[0]) + 1
    if span > _SPARSEST * len(known):
        return None
    table = np.full(span + 1, UNKNOWN)
    table[known - known[0]] = np.arange(len(known))
    return table


def _codes(
    known: np.ndarray,
    ids: Sequence[Any],
    name: str,
    *,
    strict: bool = True,
    table: np.ndarray | None = None,
) -> np.ndarray:
    """Places of ids in the ascending `known`, `UNKNOWN` where they are not in it."""
    integers = bool(np.issubdtype(known.dtype, np.integer))
    kind = int if integers else str
    if not set(map(type, ids)) <= {kind}:
        if not strict:
            return np.full(len(ids), UNKNOWN)
        place, value = next((p, v) for p, v in enumerate(ids) if type(v) is not kind)
        expected = "an integer" if integers else "text"
        raise RequestError(
            f"{name}[{place}]", f"item ids of this model are {expected}, got {value!r}"
        )
    wanted: np.ndarray
    try:
        wanted = np.asarray(ids, dtype=np.int64 if integers else np.str_)
    except OverflowError:
        place, value = next((p, v) for p, v in enumerate(ids) if not -(2**63) <= v < 2**63)
        raise RequestError(f"{name}[{place}]", f"takes a 64-bit integer, got {value}") from None
    if not len(ids) or not len(known):
        return np.full(len(ids), UNKNOWN)
    if table is not None:
        first, last = int(known[0]), int(known[-1])
        inside = (wanted >= first) & (wanted <= last)
        return table[np.where(inside, wanted - first, len(table) - 1)]
    places = np.searchsorted(known, wanted).clip(max=len(known) - 1)
    return np.where(known[places] == wanted, places, UNKNOWN)
