"""Fields of the host's configuration objects, set from gin."""

from collections.abc import Mapping
from typing import Any

from hpgr_plugin.errors import HpgrError


def set_fields(argument: str, config: Any, fields: Mapping[str, Any]) -> None:
    """Set fields of one of the host's configuration objects, by name.

    Args:
        argument: The gin binding that they come from, for the message.
        config: The object; changed in place.
        fields: Values by name.

    Raises:
        HpgrError: An unknown field.
    """
    for name, value in fields.items():
        if not hasattr(config, name):
            raise HpgrError(
                f"{argument} sets {name!r}, which is no field of {type(config).__name__}; "
                f"it has {sorted(vars(config))}"
            )
        setattr(config, name, value)


def set_table_fields(
    argument: str, tables: dict[str, Any], fields: Mapping[str, Mapping[str, Any]]
) -> None:
    """The same for embedding tables, by table and name.

    Raises:
        HpgrError: An unknown table or field.
    """
    for table, settings in fields.items():
        if table not in tables:
            raise HpgrError(f"{argument} names table {table!r}; there are {sorted(tables)}")
        set_fields(f"{argument}[{table!r}]", tables[table], settings)
