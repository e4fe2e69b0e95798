"""Requests planned on the host: the same logits, and nothing to wait for on CUDA."""

from collections.abc import Callable

import pytest
import torch
from test_ranker import make_batch, make_model
from waits import Waits

from hpgr_plugin.components.attention_hooks import (
    PreferenceGuidedSparseAttention,
    StochasticLength,
)
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.data import RequestLoader
from hpgr_plugin.hosts.embedded.model.cross_features import CrossFeatures
from hpgr_plugin.hosts.embedded.model.mtgr import MTGRLayer
from hpgr_plugin.hosts.embedded.model.ranker import HSTURanker
from hpgr_plugin.hosts.embedded.model.rivals.bert4rec import BERT4Rec
from hpgr_plugin.hosts.embedded.model.rivals.dnn import DNN
from hpgr_plugin.hosts.embedded.model.rivals.gru4rec import GRU4Rec
from hpgr_plugin.hosts.embedded.model.rivals.moe import MoE
from hpgr_plugin.hosts.embedded.model.rivals.sasrec import SASRec
from hpgr_plugin.hosts.embedded.model.rivals.wukong import Wukong
from hpgr_plugin.hosts.embedded.model.token_features import GapFeatures
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train.planned import Packed, RequestPlanner

RIVALS = {kind.__name__: kind for kind in (BERT4Rec, DNN, GRU4Rec, MoE, SASRec, Wukong)}


def sem(**settings: bool) -> SessionEnhancementModule:
    return SessionEnhancementModule(
        embedding_dim=8, num_heads=2, gap_seconds=600, causal=True, gate_init=1.0, **settings
    )


def pgsa(layout: str) -> PreferenceGuidedSparseAttention:
    return PreferenceGuidedSparseAttention(top_k=2, sigma=0.6, recent=1, layout=layout)


def aware(**settings: str) -> TimeAwarePositionalEncoder:
    return TimeAwarePositionalEncoder(embedding_dim=8, max_positions=17, **settings)


CASES: dict[str, Callable[[], dict]] = {
    "HSTU": dict,
    "MTGR": lambda: {"layer": MTGRLayer, "token_features": [CrossFeatures, GapFeatures]},
    "absolute": lambda: {"positional_encoder": aware()},
    "relative": lambda: {"positional_encoder": aware(form="relative")},
    "PGSA": lambda: {"attention_hook": pgsa("shared_history")},
    "PGSA per candidate": lambda: {"attention_hook": pgsa("per_candidate")},
    "stochastic": lambda: {"attention_hook": StochasticLength(alpha=1.1, max_history=8)},
    "SEM": lambda: {"sem": sem(own_session=True)},
    "session tokens": lambda: {
        "sem": sem(session_tokens=True),
        "attention_hook": pgsa("shared_history"),
    },
    **{name: lambda kind=kind: {"encoder": kind} for name, kind in RIVALS.items()},
}


def model_of(case: str) -> HSTURanker:
    return make_model(user_feature_sizes={"age": 3, "job": 2}, **CASES[case]())


@pytest.mark.parametrize("case", CASES)
def test_a_plan_changes_no_number(case: str) -> None:
    model = model_of(case)
    batch = make_batch([5, 0, 1, 16, 9], [3, 2, 1, 4, 0], features=True)
    planned = RequestPlanner(model, torch.device("cpu")).plan(batch)
    assert torch.equal(
        planned.to(torch.device("cpu")).logits_of(model), model(batch, every_task=True)
    )


@pytest.mark.parametrize("case", CASES)
def test_packing_changes_no_number(case: str) -> None:
    model = model_of(case)
    batch = make_batch([5, 0, 1, 16, 9], [3, 2, 1, 4, 0], features=True)
    planned = RequestPlanner(model, torch.device("cpu")).plan(batch)
    packed = Packed(planned, pinned=False).to(torch.device("cpu"))
    assert packed.plan.requests.longest_history == 16
    assert packed.batch.history_items.data_ptr() % 64 == 0
    assert packed.batch.candidate_items.data_ptr() % 64 == 0
    assert torch.equal(packed.logits_of(model), model(batch, every_task=True))


def tensors_in(value: object) -> list[torch.Tensor]:
    """All tensors, also those in what `Packed` does not know."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return tensors_in(list(value.values()))
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors_in(part)]
    return tensors_in(vars(value)) if hasattr(value, "__dict__") else []


@pytest.mark.parametrize("case", CASES)
def test_no_tensor_of_a_plan_stays_on_the_host(case: str) -> None:
    batch = make_batch([5, 0, 1, 16, 9], [3, 2, 1, 4, 0], features=True)
    planned = RequestPlanner(model_of(case), torch.device("cpu")).plan(batch)
    moved = planned.to(torch.device("meta"))
    assert len(tensors_in(moved)) == len(tensors_in(planned)) > 10
    assert all(tensor.is_meta for tensor in tensors_in(moved))


@pytest.mark.parametrize("case", RIVALS)
def test_a_planned_rival_waits_for_nothing(case: str) -> None:
    model, batch = model_of(case), make_batch([5, 0, 1, 16], [3, 2, 1, 4], features=True)
    plan = model.plan_requests(batch)
    with Waits() as waits:
        model(batch, plan=plan).sum().backward()
    assert waits.seen == []


def test_cross_features_wait_for_nothing() -> None:
    model, batch = model_of("MTGR"), make_batch([5, 0, 1, 16], [3, 2, 1, 4], features=True)
    index = model.plan_requests(batch).requests
    with Waits() as waits:
        for features in model.token_features:
            features(batch, index)
    assert waits.seen == []


def test_a_batch_is_refused_where_it_is_planned() -> None:
    batch = make_batch([5, 4], [1, 1])
    batch.history_timestamps[6] = 10**6
    planner = RequestPlanner(make_model(positional_encoder=aware()), torch.device("cpu"))
    with pytest.raises(
        ValueError, match="history_timestamps must ascend in every row, but in row 1"
    ):
        planner.plan(batch)


def test_scores_are_read_once(configure: Callable[..., Task]) -> None:
    task = configure()
    model = HSTURanker(
        num_items=task.data.log.num_items,
        num_actions=task.data.log.num_actions,
        vocabulary_digest="d",
        embedding_dim=8,
        max_history=60,
        encoder=DNN,
    ).eval()
    loader: RequestLoader = task.loader("validation")
    assert loader.num_batches() > 2
    scores = []
    for batch in loader.batches():
        scores.append(model(batch).sigmoid())
    expected = torch.cat(scores).detach().numpy()
    with Waits() as waits:
        found = task.score(model, loader)
    assert waits.seen == []
    assert (found.scores == expected).all()


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["HSTU", "MTGR", "absolute", "relative", "SEM", *RIVALS])
def test_a_planned_step_waits_for_nothing_on_cuda(case: str) -> None:
    sizes = {"embedding_dim": 32, "num_heads": 2}
    slots = {name: value for name, value in CASES[case]().items() if name not in sizes}
    for name in ("sem", "positional_encoder"):
        if name in slots:
            slots[name] = _wide(case)
    model = make_model(user_feature_sizes={"age": 3, "job": 2}, **sizes, **slots)
    model = model.float().cuda().train()
    planner = RequestPlanner(model, torch.device("cuda"))
    lengths = [5, 0, 1, 16, 9] * 40
    batches = [make_batch(lengths, [3, 2, 1, 4, 0] * 40, seed=n, features=True) for n in range(12)]
    planned = [planner.plan(batch) for batch in batches]
    try:
        for number, batch in enumerate(planned):
            # The first compiles, and ten of them are looked at by the check of visibility.
            torch.cuda.set_sync_debug_mode("error" if number > 10 else "default")
            with torch.autocast("cuda", torch.bfloat16):
                loss = batch.to(planner.device).logits_of(model).float().sum()
            loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _wide(case: str) -> torch.nn.Module:
    """The component of a case for embeddings of 32."""
    if case == "SEM":
        return SessionEnhancementModule(
            embedding_dim=32, num_heads=2, gap_seconds=600, causal=True, own_session=True
        )
    return TimeAwarePositionalEncoder(embedding_dim=32, max_positions=17, form=case)
