"""The host's inference harness with slots: what it looks up, and its worker processes."""

import inspect
from typing import Any

import gin
from generative_recommenders.dlrm_v3.inference import inference_modules, model_family

from hpgr_plugin.config.bindings import as_text
from hpgr_plugin.config.registry import configured
from hpgr_plugin.hosts.seams import replaced

_HostModel: Any = inference_modules.DlrmHSTU
_HostWorkers: Any = model_family.ModelFamilyDenseDist


class ConfiguredWorkers(_HostWorkers):
    """The host's dense workers, one process per GPU, with the configuration of their starter.

    A spawned process begins without gin bindings and with the host's own names, so it would build
    the model without slots. Unpickling this class imports the adapter there, which attaches it.
    """

    # The contract reads the parameters of the class that this one replaces.
    __signature__ = inspect.signature(_HostWorkers)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # The host's constructor looks its own class up by the name that this one has taken.
        with replaced(model_family, ModelFamilyDenseDist=_HostWorkers):
            super().__init__(*args, **kwargs)
        self.configuration = as_text()

    def distributed_setup(self, rank: int, world_size: int, model_path: str) -> None:
        """One worker process: as the host's, after reading the configuration."""
        # What only the starting process knows, such as the harness's own `run`, is not read here.
        gin.parse_config(self.configuration, skip_unknown=True)
        super().distributed_setup(rank, world_size, model_path)


def replacements() -> tuple[tuple[Any, dict[str, Any]], ...]:
    """Modules of the host's harness, and what takes the place of their names."""
    return (
        (inference_modules, {_HostModel.__name__: configured("DlrmHSTU")}),
        (model_family, {_HostWorkers.__name__: ConfiguredWorkers}),
    )
