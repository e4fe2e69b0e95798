"""The host's ranker with its slots filled as a program of `torch.export`.

A program takes two users or more, and any numbers of history items and candidates. It is the
model's own code and the host's PyTorch kernels; parts with sizes that depend on data are single
nodes, see `opaque`. `WholeRanker` begins with the embedding lookup, `DenseRanker` after it, where
the host's inference harness divides its model too. Programs are called inside `torch.no_grad()`.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from generative_recommenders.common import HammerKernel
from generative_recommenders.modules.dlrm_hstu import SequenceEmbedding
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from hpgr_plugin.components.attention_hooks import PreferenceGuidedSparseAttention
from hpgr_plugin.components.positions import TimeAwarePositionalEncoder
from hpgr_plugin.components.sem import SessionEnhancementModule
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.dlrm_v3 import opaque
from hpgr_plugin.hosts.dlrm_v3.attention import PreferenceSTULayer
from hpgr_plugin.hosts.dlrm_v3.checks import TimesCheck
from hpgr_plugin.hosts.dlrm_v3.features import Features
from hpgr_plugin.hosts.dlrm_v3.fused import FusedLayers
from hpgr_plugin.hosts.dlrm_v3.model import DlrmHSTU
from hpgr_plugin.hosts.seams import replaced
from hpgr_plugin.ops.compact.parts import visible_plan
from hpgr_plugin.ops.hstu_attention import hstu_attention
from hpgr_plugin.ops.preference_plan import count_earlier, plan_preferences

# Where `len` and `int` of a traced size have to stay symbolic.
_sizes: Any = _config
_HOST = tuple(f"generative_recommenders.{part}" for part in ("common", "modules", "ops"))
_TRACED = (*_HOST, "hpgr_plugin.")
_AS_ONE_NODE: dict[Callable[..., Any], Callable[..., Any]] = {
    plan_preferences: opaque.traced_plan,
    count_earlier: opaque.traced_count_earlier,
    visible_plan: opaque.traced_visible_plan,
    hstu_attention: opaque.traced_attention,
}


class DenseInputs(NamedTuple):
    """What the host's `preprocess` looked up, as tensors only.

    Attributes:
        embeddings: feature -> its rows `[T, D]`, of the history, the candidates or the context.
        lengths: feature -> rows of each user `[B]`.
        payloads: the host's payload features.
        history_lengths: `[B]`.
        num_candidates: `[B]`.
        history_places: `[N]`, of any values: N is the longest history, which the host divides by.
        candidate_places: `[M]`, likewise of the candidates.
    """

    embeddings: dict[str, Tensor]
    lengths: dict[str, Tensor]
    payloads: dict[str, Tensor]
    history_lengths: Tensor
    num_candidates: Tensor
    history_places: Tensor
    candidate_places: Tensor

    @classmethod
    def of(cls, looked_up: tuple[Any, ...]) -> "DenseInputs":
        """From what `model.preprocess(uih_features, candidates_features)` returns."""
        rows, payloads, longest, lengths, most, counts = looked_up
        return cls(
            {name: feature.embedding for name, feature in rows.items()},
            {name: feature.lengths for name, feature in rows.items()},
            dict(payloads),
            lengths,
            counts,
            lengths.new_zeros(longest),
            lengths.new_zeros(most),
        )


class DenseRanker(nn.Module):
    """The ranker after the lookup, from `DenseInputs` to the predictions `[tasks, C]`.

    Args:
        model: in inference mode (`is_inference=True`) and `eval()`, on the PyTorch kernels.

    Raises:
        HpgrError: another mode, or kernels that cannot be exported.
    """

    def __init__(self, model: DlrmHSTU) -> None:
        super().__init__()
        _check_mode(model)
        self.model = model

    def forward(
        self,
        embeddings: dict[str, Tensor],
        lengths: dict[str, Tensor],
        payloads: dict[str, Tensor],
        history_lengths: Tensor,
        num_candidates: Tensor,
        history_places: Tensor,
        candidate_places: Tensor,
    ) -> Tensor:
        """See `DenseInputs`."""
        rows = {
            name: SequenceEmbedding(lengths=lengths[name], embedding=embeddings[name])
            for name in embeddings
        }
        predictions: Tensor = self.model.main_forward(
            rows,
            dict(payloads),
            history_places.shape[0],
            history_lengths,
            candidate_places.shape[0],
            num_candidates,
        )[3]
        return predictions


class WholeInputs(NamedTuple):
    """Features before the lookup, as tensors only.

    Attributes:
        history_values, history_features: of `uih_features`, a `KeyedJaggedTensor`: its values, and
            its lengths `[features, B]`.
        candidate_values, candidate_features: the same of `candidates_features`.
        history_places, candidate_places: as in `DenseInputs`.
    """

    history_values: Tensor
    history_features: Tensor
    candidate_values: Tensor
    candidate_features: Tensor
    history_places: Tensor
    candidate_places: Tensor

    @classmethod
    def of(cls, model: DlrmHSTU, history: Any, candidates: Any) -> "WholeInputs":
        """From the two `KeyedJaggedTensor` that the model is called with."""
        item = model._hstu_configs.uih_post_id_feature_name
        longest = int(history[item].lengths().max())
        most = int(candidates[candidates.keys()[0]].lengths().max())
        return cls(
            history.values(),
            history.lengths().view(len(history.keys()), -1),
            candidates.values(),
            candidates.lengths().view(len(candidates.keys()), -1),
            history.lengths().new_zeros(longest),
            history.lengths().new_zeros(most),
        )


class WholeRanker(nn.Module):
    """The ranker with its lookup, from `WholeInputs` to the predictions `[tasks, C]`.

    Args:
        model: as for `DenseRanker`, with its tables.
        history_features: names of the features of `uih_features`, in their order.
        candidate_features: the same of `candidates_features`.

    Raises:
        HpgrError: as for `DenseRanker`.
    """

    def __init__(
        self, model: DlrmHSTU, history_features: list[str], candidate_features: list[str]
    ) -> None:
        super().__init__()
        _check_mode(model)
        self.model = model
        self.features = history_features, candidate_features

    def forward(
        self,
        history_values: Tensor,
        history_features: Tensor,
        candidate_values: Tensor,
        candidate_features: Tensor,
        history_places: Tensor,
        candidate_places: Tensor,
    ) -> Tensor:
        """See `WholeInputs`."""
        pairs = (history_values, history_features), (candidate_values, candidate_features)
        keyed = [
            KeyedJaggedTensor(keys=names, values=values, lengths=lengths.flatten())
            for names, (values, lengths) in zip(self.features, pairs, strict=True)
        ]
        rows, payloads, _, lengths, _, counts = self.model.preprocess(*keyed)
        longest, most = history_places.shape[0], candidate_places.shape[0]
        predictions: Tensor = self.model.main_forward(
            rows, payloads, longest, lengths, most, counts
        )[3]
        return predictions


def _check_mode(model: DlrmHSTU) -> None:
    if not model.is_inference or model.training:
        raise HpgrError("a program needs hpgr.DlrmHSTU built with is_inference=True, in eval()")
    if model.hammer_kernel() != HammerKernel.PYTORCH:
        raise HpgrError(
            "a program needs model.set_hammer_kernel(HammerKernel.PYTORCH), got "
            f"{model.hammer_kernel()}"
        )


@torch.no_grad()
def export_program(
    ranker: DenseRanker | WholeRanker, example: DenseInputs | WholeInputs
) -> ExportedProgram:
    """A ranker as a program.

    Args:
        ranker: of a model in inference mode, on the host's PyTorch kernels.
        example: its inputs to trace with, of several users, all sizes different and above one.

    Returns:
        A program that takes the fields of such inputs, of two users or more and otherwise any
        sizes. Before one is loaded from a file, import this module: it has the operators.
    """
    ranker(*example)  # what is found out once, such as which operators fbgemm has
    shapes = tuple(
        {name: {0: Dim.AUTO} for name in part}
        if isinstance(part, dict)
        else {part.dim() - 1: Dim.AUTO}  # of features by users, the users
        for part in example
    )
    with _as_a_program():
        return torch.export.export(ranker, tuple(example), dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def _as_a_program() -> Iterator[None]:
    """Inside, the model's code is such that sizes stay symbolic, and data are not looked at."""
    with (
        # Otherwise sizes of one would not be asked about, and be wrong where they matter.
        _sizes.patch(backed_size_oblivious=True),
        _one_node_each(),
        _symbolic_sizes(),
        replaced(TimesCheck, __call__=_nothing),
        replaced(Features, one_candidate_each=_not_known),
        replaced(FusedLayers, run=_nothing),
        replaced(PreferenceSTULayer, recomputes=_not_known),
        replaced(SessionEnhancementModule, context=opaque.traced_context),
        replaced(TimeAwarePositionalEncoder, check_lengths=_nothing),
        replaced(PreferenceGuidedSparseAttention, longest_row=_whole_history),
    ):
        yield


@contextlib.contextmanager
def _one_node_each() -> Iterator[None]:
    """Inside, modules of this package call the operators as single nodes."""
    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith(("hpgr_plugin.hosts.dlrm_v3", "hpgr_plugin.components")):
                stack.enter_context(replaced(module, **_found(vars(module))))
        yield


def _found(names: Mapping[str, Any]) -> dict[str, Any]:
    known = {id(original): new for original, new in _AS_ONE_NODE.items()}
    return {name: known[id(value)] for name, value in names.items() if id(value) in known}


class _IsInteger(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, int)


class _Integer(metaclass=_IsInteger):
    """`int`, but a size that is traced stays one."""

    def __new__(cls, value: Any = 0, *others: Any) -> Any:
        value = value.item() if isinstance(value, Tensor) else value
        return value if isinstance(value, torch.SymInt) else int(value, *others)


def _length(values: Any) -> Any:
    """`len`, but that of a tensor is its size, which may be a traced one."""
    return values.shape[0] if isinstance(values, Tensor) else len(values)


@contextlib.contextmanager
def _symbolic_sizes() -> Iterator[None]:
    """Inside, `len` and `int` in the traced modules do not ask for the number behind a size."""
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.startswith(_TRACED) and name != __name__
    ]
    modules = [m for m in modules if not {"int", "len"} & vars(m).keys()]
    try:
        for module in modules:
            vars(module).update(int=_Integer, len=_length)
        yield
    finally:
        for module in modules:
            del vars(module)["int"], vars(module)["len"]


def _nothing(*_: Any, **__: Any) -> None:
    """In place of checks of data, and of a faster path."""


def _not_known(*_: Any) -> bool:
    """Whether a batch is large, or has one candidate each: a program takes others too."""
    return False


def _whole_history(_: Any, __: Any, max_history: int) -> int:
    """An upper bound of a plan's rows that needs no number."""
    return max_history
