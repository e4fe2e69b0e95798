"""HPGR in the host's retrieval trainer: `import hpgr_plugin.hosts.research` in a .gin file.

The host's `main.py` and the .gin file's other bindings stay as they are. The slots are
`hpgr.SequentialEncoder.{sem, positional_encoder, pretrained, inherited_lr_ratio}`; with all of
them empty the model is the host's own. Stage 1 over the host's own data sets, and a launcher for
machines without a GPU: `python -m hpgr_plugin.hosts.research`.

Importing this attaches the slots, or raises `HostContractError` with what the host lacks.
"""

from hpgr_plugin.hosts.contract import require
from hpgr_plugin.hosts.research_requirements import REQUIREMENTS

require("hpgr_plugin.hosts.research", REQUIREMENTS)

from hpgr_plugin.components import mim  # noqa: E402, F401  (registers MaskedItemModel with gin)
from hpgr_plugin.hosts.research.attach import attach, attached, detach, replaced_names  # noqa: E402
from hpgr_plugin.hosts.research.model import fill_slots  # noqa: E402
from hpgr_plugin.hosts.research.modules import HierarchicalInputPreprocessor  # noqa: E402
from hpgr_plugin.hosts.research.pretrain import pretrain  # noqa: E402

__all__ = [
    "REQUIREMENTS",
    "HierarchicalInputPreprocessor",
    "attach",
    "attached",
    "detach",
    "fill_slots",
    "pretrain",
    "replaced_names",
]

attach()
