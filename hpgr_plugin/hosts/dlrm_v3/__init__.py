"""HPGR in the ranking trainer of meta-recsys/generative-recommenders.

One more line in a .gin file that the host already reads, `import hpgr_plugin.hosts.dlrm_v3`,
attaches the adapter; the slots are gin parameters:

    hpgr.DlrmHSTU.sem = @hpgr.SessionEnhancementModule()
    hpgr.DlrmHSTU.positional_encoder = @hpgr.TimeAwarePositionalEncoder()
    hpgr.DlrmHSTU.attention_hook = @hpgr.PreferenceGuidedSparseAttention()
    hpgr.DlrmHSTU.pretrained = "stage1.safetensors"
    hpgr.DlrmHSTU.inherited_lr_ratio = 0.1

`python -m hpgr_plugin.hosts.dlrm_v3 --gin_config_file=FILE --mode=MODE` starts the host's training
loops with any .gin file, on CPU or CUDA.

Importing this package raises `HostContractError` if the host lacks something that it uses.
"""

from hpgr_plugin.config.registry import register
from hpgr_plugin.hosts import contract, requirements

contract.require(__name__, requirements.DLRM_V3)
register("components", "dlrm_v3")

from hpgr_plugin.hosts.dlrm_v3.attach import attach, detach, replaced_names  # noqa: E402
from hpgr_plugin.hosts.dlrm_v3.model import DlrmHSTU  # noqa: E402

__all__ = ["DlrmHSTU", "attach", "detach", "replaced_names"]

attach()
