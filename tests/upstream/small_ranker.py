"""A small DlrmHSTU of the host and batches for it, shared by the ranking tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.modules.dlrm_hstu import DlrmHSTUConfig
from generative_recommenders.modules.multitask_module import MultitaskTaskType, TaskConfig
from torch import Tensor
from torchrec.modules.embedding_configs import DataType, EmbeddingConfig
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.transfer.handoff import save_handoff

NUM_ITEMS = 50
TABLE_DIM = 16
WIDTH = 24
CONTEXT = {"user_id": 1, "country": 1}


def small_config(**changes: Any) -> DlrmHSTUConfig:
    """Two contextual tokens, a side feature, actions, one binary task, no dropout."""
    settings: dict[str, Any] = {
        "max_seq_len": 128,
        "max_num_candidates": 8,
        "hstu_num_heads": 2,
        "hstu_attn_linear_dim": 8,
        "hstu_attn_qk_dim": 8,
        "hstu_attn_num_layers": 3,
        "hstu_embedding_table_dim": TABLE_DIM,
        "hstu_preprocessor_hidden_dim": 16,
        "hstu_transducer_embedding_dim": WIDTH,
        "hstu_input_dropout_ratio": 0.0,
        "hstu_linear_dropout_rate": 0.0,
        "contextual_feature_to_max_length": dict(CONTEXT),
        "candidates_weight_feature_name": "candidate_action",
        "candidates_watchtime_feature_name": "candidate_watchtime",
        "candidates_querytime_feature_name": "candidate_time",
        "multitask_configs": [
            TaskConfig(
                task_name="click", task_weight=1, task_type=MultitaskTaskType.BINARY_CLASSIFICATION
            )
        ],
        "user_embedding_feature_names": ["item", "category", *CONTEXT],
        "item_embedding_feature_names": ["candidate_item", "candidate_category"],
        "uih_post_id_feature_name": "item",
        "uih_action_time_feature_name": "time",
        "uih_weight_feature_name": "action",
        "hstu_uih_feature_names": ["item", "category", "time", "action", "watchtime", *CONTEXT],
        "hstu_candidate_feature_names": [
            "candidate_item",
            "candidate_category",
            "candidate_time",
            "candidate_action",
            "candidate_watchtime",
        ],
        "merge_uih_candidate_feature_mapping": [
            ("item", "candidate_item"),
            ("category", "candidate_category"),
            ("time", "candidate_time"),
            ("action", "candidate_action"),
            ("watchtime", "candidate_watchtime"),
        ],
        "action_weights": [1, 2],
    }
    return DlrmHSTUConfig(**{**settings, **changes})


def small_tables() -> dict[str, EmbeddingConfig]:
    """An item table shared by history and candidates, and one for each other feature."""
    features = {
        "item_table": (NUM_ITEMS, ["item", "candidate_item"]),
        "category_table": (5, ["category", "candidate_category"]),
        "user_table": (20, ["user_id"]),
        "country_table": (4, ["country"]),
    }
    same: dict[str, Any] = {"embedding_dim": TABLE_DIM, "data_type": DataType.FP32}
    return {
        name: EmbeddingConfig(num_embeddings=rows, name=name, feature_names=names, **same)
        for name, (rows, names) in features.items()
    }


def build(
    model_class: type,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    config: DlrmHSTUConfig | None = None,
    device: str = "cpu",
    kernel: HammerKernel = HammerKernel.PYTORCH,
    **arguments: Any,
) -> Any:
    """A model with materialised tables and seeded weights."""
    torch.manual_seed(seed)
    model = model_class(
        config or small_config(),
        small_tables(),
        is_inference=False,
        **{"bf16_training": False, **arguments},
    )
    collection = model._embedding_collection
    collection.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed + 1)
    for weight in collection.parameters():
        torch.nn.init.normal_(weight, std=0.5, generator=generator)
    collection.register_forward_hook(in_dtype(dtype))
    model.set_hammer_kernel(kernel)
    model.set_training_dtype(dtype)
    return model.to(device=device, dtype=dtype)


def in_dtype(dtype: torch.dtype) -> Any:
    """torchrec looks rows up in float32 at most: a hook that hands them on in `dtype`."""

    def cast(_: Any, __: Any, looked_up: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
        return {
            name: JaggedTensor(values=rows.values().to(dtype), lengths=rows.lengths())
            for name, rows in looked_up.items()
        }

    return cast


def batch(
    lengths: Sequence[int],
    candidates: Sequence[int],
    *,
    seed: int = 0,
    later: bool = True,
    device: str = "cpu",
) -> tuple[KeyedJaggedTensor, KeyedJaggedTensor]:
    """Histories and candidates of len(lengths) users, in the host's format.

    With `later`, every candidate comes after its whole history; without, query times fall
    anywhere in it.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(bound: int, count: int) -> Tensor:
        return torch.randint(0, bound, (count,), generator=generator)

    total, num_candidates, users = sum(lengths), sum(candidates), len(lengths)
    times = torch.cat(
        [torch.empty(0, dtype=torch.int64), *(draw(20_000, n).sort().values for n in lengths)]
    )
    history = {
        "item": draw(NUM_ITEMS, total),
        "category": draw(5, total),
        "time": times,
        "action": draw(4, total),
        "watchtime": draw(100, total),
        "user_id": draw(20, users),
        "country": draw(4, users),
    }
    offered = {
        "candidate_item": draw(NUM_ITEMS, num_candidates),
        "candidate_category": draw(5, num_candidates),
        "candidate_time": draw(20_000, num_candidates) + (20_000 if later else 0),
        "candidate_action": draw(2, num_candidates),
        "candidate_watchtime": draw(100, num_candidates),
    }
    history_lengths = [[1] * users if name in CONTEXT else list(lengths) for name in history]
    return (
        _keyed(history, history_lengths).to(device),
        _keyed(offered, [list(candidates)] * len(offered)).to(device),
    )


def _keyed(values: dict[str, Tensor], lengths: list[list[int]]) -> KeyedJaggedTensor:
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(values),
        values=torch.cat(list(values.values())),
        lengths=torch.tensor(lengths).flatten(),
    )


def only_user(data: tuple[Any, Any], user: int) -> tuple[KeyedJaggedTensor, KeyedJaggedTensor]:
    """The batch of one user out of a larger one."""

    def cut(kjt: KeyedJaggedTensor) -> KeyedJaggedTensor:
        names = kjt.keys()
        features = (kjt[name] for name in names)
        rows = [f.values()[f.offsets()[user] : f.offsets()[user + 1]] for f in features]
        return _keyed(dict(zip(names, rows, strict=True)), [[len(values)] for values in rows])

    return cut(data[0]), cut(data[1])


def step(model: Any, data: tuple[Any, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """One forward and backward: the outputs, and the gradient of every parameter that has one."""
    model.zero_grad(set_to_none=True)
    user, item, losses, predictions, *_ = model(*data)
    sum(losses.values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return [user, item, predictions], gradients


def assert_same_step(mine: tuple[Any, Any], wanted: tuple[Any, Any]) -> None:
    """Outputs and gradients of `step` in float64 agree.

    The host's layer norms run in float32, whatever goes in: an ulp of that is 6e-8.
    """
    for ours, theirs in zip(mine[0], wanted[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert mine[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        torch.testing.assert_close(
            mine[1][name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def write_handoff(
    path: Path, table: Tensor, sem: SessionEnhancementModule | None = None, **more: Any
) -> str:
    """A stage-1 hand-over of an item table; its path."""
    save_handoff(path, item_table=table, sem=sem, vocabulary_digest="any", gap_seconds=1800, **more)
    return str(path)


def recorded_lengths(model: Any) -> list[list[int]]:
    """Sequence lengths that the first layer gets, one entry a pass from now on."""
    seen: list[list[int]] = []

    def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["x_lengths"] if "x_lengths" in kwargs else args[1]).tolist())

    layer = model._hstu_transducer._stu_module._stu_layers[0]
    layer.register_forward_pre_hook(record, with_kwargs=True)
    return seen
