"""The host's inference mode: dense part and tables apart, payloads without labels."""

from typing import Any

import pytest
import torch
from generative_recommenders.common import HammerKernel
from small_ranker import TABLE_DIM, WIDTH, batch, small_config, small_tables

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention, StochasticLength
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.hosts.dlrm_v3 import DlrmHSTU

pytestmark = pytest.mark.upstream

LENGTHS, CANDIDATES = [7, 1, 0, 12], [2, 1, 3, 2]
HOOKS = {
    "per_candidate": lambda: PreferenceGuidedSparseAttention(top_k=3, layout="per_candidate"),
    "shared_history": lambda: PreferenceGuidedSparseAttention(top_k=3, layout="shared_history"),
    "stochastic": lambda: StochasticLength(alpha=1.5),
    "none": lambda: None,
}


def model_of(kind: str, *, is_inference: bool, own_session: bool = False, **arguments: Any) -> Any:
    torch.manual_seed(0)
    sem = SessionEnhancementModule(
        embedding_dim=TABLE_DIM, num_heads=2, own_session=own_session, gate_init=0.5
    )
    model = DlrmHSTU(
        small_config(),
        small_tables(),
        is_inference=is_inference,
        bf16_training=False,
        sem=sem,
        positional_encoder=TimeAwarePositionalEncoder(embedding_dim=WIDTH, max_positions=64),
        attention_hook=HOOKS[kind](),
        **arguments,
    )
    if hasattr(model, "_embedding_collection"):
        model._embedding_collection.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(1)
        for weight in model._embedding_collection.parameters():
            torch.nn.init.normal_(weight, generator=generator)
    model.set_hammer_kernel(HammerKernel.PYTORCH)
    return model.eval()


@pytest.mark.parametrize("kind", HOOKS)
@torch.no_grad()
def test_inference_mode_predicts_what_evaluation_predicts(kind: str) -> None:
    data = batch(LENGTHS, CANDIDATES, later=False)
    training, inference = (model_of(kind, is_inference=mode) for mode in (False, True))
    torch.testing.assert_close(training(*data)[3], inference(*data)[3])


@pytest.mark.parametrize("kind", HOOKS)
@torch.no_grad()
def test_the_dense_part_alone_scores_looked_up_rows(kind: str) -> None:
    data = batch(LENGTHS, CANDIDATES)
    whole = model_of(kind, is_inference=True)
    dense = model_of(kind, is_inference=True, is_dense=True)
    state = {k: v for k, v in whole.state_dict().items() if not k.startswith("_embedding")}
    dense.load_state_dict(state)
    looked_up = whole.preprocess(*data)
    torch.testing.assert_close(dense.main_forward(*looked_up)[3], whole(*data)[3])
