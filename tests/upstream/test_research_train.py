"""Stage 1 and the host's own train_fn, from the example's .gin file, on CPU."""

from pathlib import Path
from typing import Any

import gin
import pytest
import torch
from generative_recommenders.research.trainer import train as host_train
from torch import Tensor, multiprocessing

from hpgr_plugin.config.registry import build
from hpgr_plugin.hosts import research
from hpgr_plugin.hosts.contract import host_version
from hpgr_plugin.hosts.launch import Configuration
from hpgr_plugin.hosts.research.launch import ranks_are_the_cpu, train_worker
from hpgr_plugin.hosts.research.pretrain import histories_of_rows
from hpgr_plugin.hosts.research.pretrained import host_item_digest
from hpgr_plugin.transfer.handoff import load_handoff

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(torch.cuda.is_available(), reason="trains on the CPU"),
]

PROJECT = Path(__file__).parents[2]
CONFIG = PROJECT / "configs" / "upstream" / "retrieval_synthetic.gin"
NUM_ITEMS, DIM, LENGTH = 3952, 32, 50
RATE, RATIO = 3e-3, 0.1
STEPS, WARMUP = 3, 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the data of the example, 16 users in one batch."""
    monkeypatch.syspath_prepend(str(PROJECT / "examples" / "upstream"))
    import retrieval_data

    retrieval_data.write(tmp_path, users=16)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(folder: Path, *bindings: str) -> str:
    """The example's file with a few steps of warm-up training in it."""
    file = folder / "run.gin"
    lines = [
        f'include "{CONFIG}"',
        "hpgr.research_pretrain.num_epochs = 1",
        f"train_fn.num_epochs = {STEPS}",
        f"train_fn.num_warmup_steps = {WARMUP}",
        "train_fn.local_batch_size = 16",
        "train_fn.eval_batch_size = 4",
        "train_fn.full_eval_every_n = 1000",
        "train_fn.partial_eval_num_iters = 1",
        *bindings,
    ]
    file.write_text("\n".join(lines))
    return str(file)


def checkpoint(folder: Path) -> dict[str, Any]:
    (file,) = (folder / "ckpts").rglob(f"*_ep{STEPS - 1}")
    loaded: dict[str, Any] = torch.load(file, weights_only=False)
    return loaded


def pretrained(folder: Path, **bindings: str) -> Any:
    gin.parse_config_file(config(folder))
    build("research_pretrain")
    return load_handoff(
        folder / "tmp" / "stage1.safetensors",
        num_items=NUM_ITEMS,
        embedding_dim=DIM,
        vocabulary_digest=host_item_digest(NUM_ITEMS),
    )


def moved(before: Tensor, after: Tensor) -> float:
    """The farthest any weight went, in units of the fresh learning rate."""
    return (after - before).abs().max().item() / RATE


def test_pretrain_then_train_with_the_smaller_rate_through_the_warm_up(folder: Path) -> None:
    handoff = pretrained(folder)
    assert handoff.sem_state is not None
    gin.clear_config()
    train_worker(0, 1, 12391, Configuration(config(folder)))
    state = checkpoint(folder)
    model = {n.removeprefix("module."): v for n, v in state["model_state_dict"].items()}

    # Adam's first steps go about the rate each: 1/2, 1 and 1 of it with the warm-up.
    whole = sum(min(1.0, (step + 1) / WARMUP) for step in range(STEPS))
    sem = "_input_features_preproc.sem."
    inherited = moved(handoff.item_table, model["_embedding_module._item_emb.weight"][1:])
    assert 0.5 * whole * RATIO < inherited < 1.5 * whole * RATIO
    for name, value in handoff.sem_state.items():
        assert moved(value, model[sem + name]) < 1.5 * whole * RATIO, name
    gate = moved(torch.zeros(DIM), model[sem + "gate"])
    assert 0.5 * whole * RATIO < gate + moved(handoff.sem_state["gate"], model[sem + "gate"])

    groups = state["optimizer_state_dict"]["param_groups"]
    assert {g["name"]: g.get("lr_scale", 1.0) for g in groups} == {"fresh": 1.0, "inherited": RATIO}


def test_training_leaves_the_host_s_names_as_they_were(folder: Path) -> None:
    before = (host_train.setup, host_train.DDP, torch.nn.Module.to)
    with ranks_are_the_cpu():
        assert torch.nn.Linear(2, 2).to(0).weight.device.type == "cpu"
        assert torch.zeros(2).to(1).device.type == "cpu"
        assert torch.zeros(2, device=0).device.type == "cpu"
        assert torch.zeros(2).to(torch.float64).dtype == torch.float64
    assert (host_train.setup, host_train.DDP, torch.nn.Module.to) == before


@pytest.mark.parametrize("main_module", ["HSTU", "SASRec"])
def test_empty_slots_train_the_host_to_the_last_bit(folder: Path, main_module: str) -> None:
    states = []
    bindings = (
        "hpgr.SequentialEncoder.sem = None",
        "hpgr.SequentialEncoder.positional_encoder = None",
        "hpgr.SequentialEncoder.pretrained = None",
        f'train_fn.main_module = "{main_module}"',
    )
    for port, attached in ((12392, True), (12393, False)):
        gin.clear_config()
        gin.parse_config_file(config(folder, *bindings))
        research.attach()
        if not attached:
            research.detach()
        torch.manual_seed(0)
        with ranks_are_the_cpu():
            host_train.train_fn(0, 1, port)
        states.append(checkpoint(folder))
    research.attach()
    first, second = (state["model_state_dict"] for state in states)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_workers_train_one_model(folder: Path) -> None:
    pretrained(folder)
    bindings = ("train_fn.local_batch_size = 8", "train_fn.eval_batch_size = 8")
    multiprocessing.start_processes(
        train_worker,
        args=(2, 12394, Configuration(config(folder, *bindings))),
        nprocs=2,
        start_method="spawn",
    )
    values = checkpoint(folder)["model_state_dict"].values()
    assert all(value.isfinite().all() for value in values)


def test_histories_hold_the_target_and_nothing_after_it(folder: Path) -> None:
    gin.parse_config_file(config(folder))
    from generative_recommenders.research.data.reco_dataset import get_reco_dataset

    dataset = get_reco_dataset(dataset_name="ml-1m", max_sequence_length=8, chronological=True)
    frame = dataset.train_dataset.ratings_frame
    rows = [dataset.train_dataset[index] for index in range(len(frame))]
    batch = torch.utils.data.default_collate(rows)
    histories = histories_of_rows(batch)
    for user, line in enumerate(frame.itertuples()):
        items = [int(i) for i in line.sequence_item_ids.split(",")][:-1][-9:]
        seconds = [int(t) for t in line.sequence_timestamps.split(",")][:-1][-9:]
        inside = slice(int(histories.offsets[user]), int(histories.offsets[user + 1]))
        assert (histories.items[inside] + 1).tolist() == items
        assert histories.timestamps[inside].tolist() == seconds


def test_example_configs_bind_only_what_is_read() -> None:
    """Every binding names a parameter that exists; gin raises on any other."""
    gin.parse_config_file(str(CONFIG))


def test_movielens_config_stands_on_the_host_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    root = host_version().root
    if root is None or not (root / "configs").is_dir():
        pytest.skip("the host on the path has no configs folder beside its package")
    monkeypatch.chdir(root)
    gin.parse_config_file(str(CONFIG.parent / "retrieval_ml-1m.gin"))
    macros = {"DIM": "item_embedding_dim", "SEQUENCE_LENGTH": "max_sequence_length"}
    mine = {name: gin.query_parameter(f"{name}/gin.macro.value") for name in macros}
    gin.clear_config()
    gin.parse_config_file("configs/ml-1m/hstu-sampled-softmax-n128-final.gin")
    theirs = {name: gin.query_parameter(f"train_fn.{key}") for name, key in macros.items()}
    assert mine == theirs
