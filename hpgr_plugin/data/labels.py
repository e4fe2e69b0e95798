"""Label rules: which value of which field counts as a positive, for one task or several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from hpgr_plugin.data.events import DataError, require


@dataclass(frozen=True)
class LabelRule:
    """label = 1 where `field` >= threshold, else 0; `binary`: the field takes only 0 and 1."""

    field: str
    threshold: float
    binary: bool = False

    def labels(self, values: np.ndarray) -> np.ndarray:
        """int8 [E] of values [E].

        Raises:
            DataError: a binary field holds another value.
        """
        other = values[(values != 0) & (values != 1)] if self.binary else values[:0]
        if len(other):
            problem = f"takes 0 or 1 as a label, got {other[0]:g}; see hpgr.rating_at_least"
            raise DataError(problem, field=self.field)
        return (values >= self.threshold).astype(np.int8)


def rating_at_least(threshold: float = 4.0, field: str = "rating") -> LabelRule:
    """A rating of at least `threshold` is a positive."""
    return LabelRule(field=field, threshold=threshold)


def label_column(field: str = "label") -> LabelRule:
    """The field holds the label itself, 0 or 1."""
    return LabelRule(field=field, threshold=0.5, binary=True)


def task_rules(tasks: Mapping[str, str | LabelRule]) -> dict[str, LabelRule]:
    """The rules of further tasks, by the tasks' names.

    Args:
        tasks: name -> rule, or the field that holds the label itself, 0 or 1.

    Raises:
        HpgrError: a name that is no word, or a value that is no rule.
    """
    binding, rules = "prepare_data.tasks", {}
    require(isinstance(tasks, Mapping), binding, "{'name': 'field'}", tasks)
    for name, rule in tasks.items():
        fits = isinstance(name, str) and name.isidentifier()
        require(fits, binding, "names of letters, digits and _, such as 'like'", name)
        rule = label_column(rule) if isinstance(rule, str) else rule
        takes = "a field, @hpgr.label_column() or @hpgr.rating_at_least()"
        require(isinstance(rule, LabelRule), f"{binding}[{name!r}]", takes, rule)
        rules[name] = rule
    return rules
