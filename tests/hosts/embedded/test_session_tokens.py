"""Session tokens among the tokens of the ranker: who sees them, and every layout of a plan."""

from dataclasses import replace

import pytest
import torch
from test_ranker import MAX_HISTORY, NUM_ITEMS, make_batch, make_model

from hpgr_plugin.components.attention_hooks import (
    PreferenceGuidedSparseAttention,
    StochasticLength,
)
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.model.hstu import HSTULayer
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.model.rivals.sasrec import SASRec

BATCH = make_batch([5, 0, 1, 16, 9], [3, 2, 1, 4, 2], features=True)


def with_tokens(session_tokens: bool = True, **overrides: object) -> HSTURanker:
    torch.manual_seed(3)
    sem = SessionEnhancementModule(
        embedding_dim=8,
        num_heads=2,
        gap_seconds=600,
        causal=True,
        session_tokens=session_tokens,
    )
    sizes = {"age": 3, "job": 2}
    model = make_model(sem=sem, user_feature_sizes=sizes, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "table" in name or name.startswith("sem."):
                parameter.normal_()
    return model


@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
def test_candidates_read_them(layer: type) -> None:
    model, plain = with_tokens(layer=layer), with_tokens(False, layer=layer)
    plain.load_state_dict(model.state_dict(), strict=False)
    sessions = model.sem.plan(BATCH.history_offsets, BATCH.history_timestamps)
    assert len(sessions.session_offsets) > 12  # several of a user
    differs = model(BATCH) != plain(BATCH)
    assert differs.any()
    assert not differs[3:6].any()  # users without a second session


@pytest.mark.parametrize("layout", ["per_candidate", "shared_history"])
@pytest.mark.parametrize("layer", [HSTULayer, MTGRLayer])
def test_a_plan_of_everything_changes_nothing(layout: str, layer: type) -> None:
    hook = PreferenceGuidedSparseAttention(top_k=0, recent=MAX_HISTORY, layout=layout)
    model, dense = with_tokens(attention_hook=hook, layer=layer), with_tokens(layer=layer)
    dense.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(BATCH), dense(BATCH), rtol=0, atol=1e-10)


def test_they_stay_where_a_user_is_shortened() -> None:
    hook = StochasticLength(alpha=1.1, max_history=8)
    model, plain = (with_tokens(on, attention_hook=hook).train() for on in (True, False))
    plain.load_state_dict(model.state_dict(), strict=False)
    outputs = []
    for each in (model, plain):
        each.attention_hook = StochasticLength(alpha=1.1, max_history=8)
        outputs.append(each(BATCH))
    assert torch.isfinite(outputs[0]).all()
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("layout", [None, "per_candidate", "shared_history"])
def test_items_and_times_of_the_future_do_not_show(layout: str | None) -> None:
    """Sessions after a candidate may come, go and move: its logit stays."""
    hook = layout and PreferenceGuidedSparseAttention(top_k=2, recent=2, layout=layout)
    model = with_tokens(attention_hook=hook or None).eval()
    before = model(BATCH)
    owner = torch.arange(5).repeat_interleave(BATCH.candidate_offsets.diff())
    generator = torch.Generator().manual_seed(0)
    for c in range(BATCH.num_candidates):
        user, time = int(owner[c]), int(BATCH.candidate_timestamps[c])
        start, end = BATCH.history_offsets[user : user + 2].tolist()
        rows = [i for i in range(start, end) if BATCH.history_timestamps[i] >= time]
        times, items = BATCH.history_timestamps.clone(), BATCH.history_items.clone()
        moved = time + torch.randint(0, 9000, (len(rows),), generator=generator).sort().values
        times[rows] = moved
        items[rows] = (items[rows] + 7) % NUM_ITEMS
        after = model(replace(BATCH, history_timestamps=times, history_items=items))
        torch.testing.assert_close(after[c], before[c], rtol=0, atol=1e-12)


def test_rivals_have_none() -> None:
    with pytest.raises(HpgrError, match=r"session_tokens must be False for hpgr.HSTURanker.enc"):
        with_tokens(encoder=SASRec)
