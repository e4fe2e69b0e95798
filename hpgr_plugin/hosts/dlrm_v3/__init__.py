"""HPGR in the ranking trainer of meta-recsys/generative-recommenders.

One more line in the .gin file that the host already reads, `import hpgr_plugin.hosts.dlrm_v3`,
attaches; the slots are gin parameters:

    hpgr.DlrmHSTU.sem = @hpgr.SessionEnhancementModule()
    hpgr.DlrmHSTU.positional_encoder = @hpgr.TimeAwarePositionalEncoder()
    hpgr.DlrmHSTU.attention_hook = @hpgr.PreferenceGuidedSparseAttention()
    hpgr.DlrmHSTU.pretrained = "stage1.safetensors"
    hpgr.DlrmHSTU.inherited_lr_ratio = 0.1

`python -m hpgr_plugin.hosts.dlrm_v3 --gin_config_file=... --mode=...` starts the host's loops
with any .gin file, on CPU or CUDA.
"""

from hpgr_plugin.hosts import contract
from hpgr_plugin.hosts.dlrm_v3_requirements import REQUIREMENTS

contract.require(__name__, REQUIREMENTS)

from hpgr_plugin.components import attention_hooks as hooks  # noqa: E402
from hpgr_plugin.components import positions, sem  # noqa: E402  # to register the slots' tenants with gin
from hpgr_plugin.hosts.dlrm_v3.attach import attach, detach, replaced_names  # noqa: E402
from hpgr_plugin.hosts.dlrm_v3.model import DlrmHSTU  # noqa: E402

__all__ = ["DlrmHSTU", "attach", "detach", "hooks", "positions", "replaced_names", "sem"]

attach()
