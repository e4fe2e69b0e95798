"""HPGR in the retrieval trainer of meta-recsys/generative-recommenders.

One more line in a .gin file that the host already reads, `import hpgr_plugin.hosts.research`,
attaches the adapter; the slots are gin parameters:

    hpgr.SequentialEncoder.sem = @hpgr.SessionEnhancementModule()
    hpgr.SequentialEncoder.positional_encoder = @hpgr.TimeAwarePositionalEncoder()
    hpgr.SequentialEncoder.pretrained = "stage1.safetensors"
    hpgr.SequentialEncoder.inherited_lr_ratio = 0.1

`python -m hpgr_plugin.hosts.research --gin_config_file=FILE --mode=MODE` starts the host's training
or stage 1 over the host's data sets, on CPU or CUDA.

Importing this package raises `HostContractError` if the host lacks something that it uses.
"""

from hpgr_plugin.config.registry import register
from hpgr_plugin.hosts import contract, requirements

contract.require(__name__, requirements.RESEARCH)
register("components", "research")

from hpgr_plugin.hosts.research.attach import attach, attached, detach, replaced_names  # noqa: E402
from hpgr_plugin.hosts.research.model import SequentialEncoder  # noqa: E402
from hpgr_plugin.hosts.research.pretrain import research_pretrain  # noqa: E402

__all__ = [
    "SequentialEncoder",
    "attach",
    "attached",
    "detach",
    "replaced_names",
    "research_pretrain",
]

attach()
