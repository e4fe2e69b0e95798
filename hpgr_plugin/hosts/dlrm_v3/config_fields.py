"""Fields of the host's configuration objects, set from gin."""

from collections.abc import Mapping
from typing import Any


def set_fields(argument: str, config: Any, fields: Mapping[str, Any]) -> None:
    """Set fields of one of the host's configuration objects, by name.

    Args:
        argument: Where they come from, for the message.
        config: The object; changed in place.
        fields: Values by name.

    Raises:
        ValueError: An unknown field.
    """
    for name, value in fields.items():
        if not hasattr(config, name):
            raise ValueError(
                f"{argument} sets {name!r}, which is no field of {type(config).__name__}; "
                f"it has {sorted(vars(config))}"
            )
        setattr(config, name, value)


def set_table_fields(tables: dict[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> None:
    """The same for embedding tables, by table and name.

    Raises:
        ValueError: An unknown table or field.
    """
    for table, settings in fields.items():
        if table not in tables:
            raise ValueError(f"table_config names table {table!r}; there are {sorted(tables)}")
        set_fields(f"table_config[{table!r}]", tables[table], settings)
