"""The transducer's pass over its sequences, padded to one of a few sizes.

Behind the users of a batch come others that own the padding, so that every offset, length and total
is consistent and the host's modules compute what they always do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hpgr_plugin.components.captured import PaddedInput, padded_size
from hpgr_plugin.components.sem import SessionContext
from hpgr_plugin.hosts.dlrm_v3.features import CANDIDATE_IDS, HISTORY_IDS, Features
from hpgr_plugin.hosts.dlrm_v3.request import Request
from hpgr_plugin.hosts.dlrm_v3.selection import FullPlaces
from hpgr_plugin.ops.compact.parts import SequenceParts, joined_parts
from hpgr_plugin.ops.jagged import segment_ids
from hpgr_plugin.ops.preference_plan import PreferencePlan

_FULL_LENGTH = 1024  # n of 1/n inside a padded pass: the real one is a factor of the weights
_PAYLOAD = "payload "  # in front of the names of the host's payloads
# Payloads that the padded pass makes, or that only the plan reads.
_MADE = ("uih_offsets", "candidate_offsets", HISTORY_IDS, CANDIDATE_IDS)


class PaddedSizes(NamedTuple):
    """Of a padded pass.

    Attributes:
        users: sequences, those of the padding included.
        history: rows of all histories.
        candidates: of all users.
        kept: items of all rows of the plan.
    """

    users: int
    history: int
    candidates: int
    kept: int


class Bounds(NamedTuple):
    """Upper bounds inside a padded pass; of whole histories, from which n follows, the exact ones.

    Attributes:
        max_history: history rows of a user.
        max_targets: candidates of a user.
        longest_row: items of a row of the plan.
    """

    max_history: int
    max_targets: int
    longest_row: int


def padded_sizes(request: Request, plan: PreferencePlan, bounds: Bounds) -> PaddedSizes:
    """The sizes for a batch, with users enough to own the padding.

    Args:
        request: with a plan by candidate.
        plan: the request's.
        bounds: of the padded pass.
    """
    parts = request.parts
    users = parts.seq_offsets.numel() - 1
    history = padded_size(parts.num_history + 1)
    owners = _share(history - parts.num_history, bounds.max_history)
    if request.by_user:
        users = padded_size(users + owners)
        return PaddedSizes(users, history, users, history)
    kept = padded_size(plan.index.numel() + 1)
    more = _share(kept - plan.index.numel(), bounds.longest_row)
    candidates = padded_size(parts.num_candidates + more)
    owners = max(owners, _share(candidates - parts.num_candidates, bounds.max_targets))
    return PaddedSizes(padded_size(users + owners), history, candidates, kept)


class PaddedPass:
    """One pass of the transducer, its inputs and how to run it on padded copies of them.

    Args:
        call: the arguments of the transducer's forward.
        request: one that `can_pad`.
        features: of the host's configuration.

    Attributes:
        inputs: what the pass reads, by name.
        key: what else it depends on.
        num_candidates: of the batch itself: the first rows of the padded output.
    """

    def __init__(self, call: dict[str, Any], request: Request, features: Features) -> None:
        plan = request.plan
        assert plan is not None
        self._request, self._features = request, features
        self.bounds = _bounds(call, request)
        self.sizes = padded_sizes(request, plan, self.bounds)
        self.num_candidates = request.parts.num_candidates
        sizes = self.sizes
        rows = sizes.history + sizes.candidates
        self._dtypes = {name: call[name].dtype for name in ("seq_lengths", "num_targets")}
        self.inputs: dict[str, PaddedInput] = {
            "seq_embeddings": PaddedInput(call["seq_embeddings"], rows),
            "seq_timestamps": PaddedInput(call["seq_timestamps"], rows),
            **self._padded_offsets(request, plan),
            "weights": PaddedInput(plan.weights, sizes.kept),
            **self._padded_places(request.places),
        }
        if not is_whole(request):
            scale = _FULL_LENGTH / (request.full_length or 1)
            self.inputs["weight_scale"] = PaddedInput(plan.weights[:0], 1, scale)
        if not request.by_user:
            first = request.parts.num_history  # a row of the padding
            self.inputs["index"] = PaddedInput(plan.index, sizes.kept, first)
        if request.context is not None:
            self.inputs.update(self._padded_context(request.context))
        for name, values in call["seq_payloads"].items():
            if name not in _MADE:
                self.inputs[_PAYLOAD + name] = self._padded_payload(name, values)
        self.key = (
            self.bounds,
            sizes,
            request.layout,
            request.by_user,
            tuple(self._dtypes.values()),
        )

    def arguments(self, copies: dict[str, Tensor]) -> tuple[dict[str, Any], Request]:
        """The transducer's arguments and request, of the padded copies of `inputs`."""
        sizes, request = self.sizes, self._request
        device = copies["history_offsets"].device
        history = copies["history_offsets"].clamp(max=sizes.history)
        if request.by_user:
            candidates = torch.arange(sizes.users + 1, device=device)
        else:
            candidates = copies["candidate_offsets"].clamp(max=sizes.candidates)
        parts = joined_parts(
            history,
            candidates,
            contextual_len=request.parts.contextual_len,
            num_history=sizes.history,
            num_candidates=sizes.candidates,
            one_candidate_each=request.by_user,
        )
        if request.by_user:
            index, plan_offsets = torch.arange(sizes.kept, device=device), history
        else:
            index, plan_offsets = copies["index"], copies["plan_offsets"].clamp(max=sizes.kept)
        if is_whole(request):
            # Items of the padding are the first of their own users.
            users = parts.candidate_users()[segment_ids(plan_offsets, sizes.kept)]
            index = torch.maximum(index, history[:-1][users])
        plan = PreferencePlan(index, copies["weights"], plan_offsets)
        context = None
        if "context.summary" in copies:
            offsets = copies["context.session_offsets"]
            own = copies.get("context.own")
            context = SessionContext(copies["context.summary"], offsets, own)
        padded = replace(
            request,
            parts=parts,
            plan=plan,
            places=self._places(parts, copies),
            context=context,
            max_targets=self.bounds.max_targets,
            longest_row=self.bounds.longest_row,
            full_length=None if is_whole(request) else _FULL_LENGTH,
            weight_scale=copies.get("weight_scale"),
        )
        targets = candidates.diff()
        call = {
            "max_uih_len": self.bounds.max_history,
            "max_targets": self.bounds.max_targets,
            "total_uih_len": sizes.history,
            "total_targets": sizes.candidates,
            "seq_embeddings": copies["seq_embeddings"],
            "seq_timestamps": copies["seq_timestamps"],
            "seq_lengths": (history.diff() + targets).to(self._dtypes["seq_lengths"]),
            "num_targets": targets.to(self._dtypes["num_targets"]),
            "seq_payloads": {
                **self._payloads(copies),
                "uih_offsets": history,
                "candidate_offsets": candidates,
            },
        }
        return call, padded

    def _padded_offsets(self, request: Request, plan: PreferencePlan) -> dict[str, PaddedInput]:
        sizes, parts = self.sizes, request.parts
        history = _extended(parts.history_offsets, parts.num_history, sizes.users, sizes.history)
        if request.by_user:
            return {"history_offsets": history}
        return {
            "history_offsets": history,
            "candidate_offsets": _extended(
                parts.candidate_offsets, parts.num_candidates, sizes.users, sizes.candidates
            ),
            "plan_offsets": _extended(
                plan.offsets, plan.index.numel(), sizes.candidates, sizes.kept
            ),
        }

    def _padded_places(self, places: FullPlaces | None) -> dict[str, PaddedInput]:
        if places is None:
            return {}
        inputs = {}
        if not is_whole(self._request):
            behind = torch.iinfo(places.rows.dtype).max  # all rows
            inputs["places.rows"] = PaddedInput(places.rows, self.sizes.history, behind)
            inputs["places.full_offsets"] = PaddedInput(places.full_offsets, self.sizes.users + 1)
        if places.earlier is not None:
            inputs["places.earlier"] = PaddedInput(places.earlier, self.sizes.candidates)
        return inputs

    def _places(self, parts: SequenceParts, copies: dict[str, Tensor]) -> FullPlaces | None:
        """Of the padded sequences `parts`."""
        if self._request.places is None:
            return None
        earlier = copies.get("places.earlier")
        if is_whole(self._request):
            rows = torch.arange(parts.num_history, device=parts.history_offsets.device)
            return FullPlaces(parts, rows, parts.history_offsets, earlier)
        full_offsets = _repeated(copies["places.full_offsets"])
        # Rows of the padding are at the end of the last full history.
        rows = torch.minimum(copies["places.rows"], full_offsets[-1])
        return FullPlaces(parts, rows, full_offsets, earlier)

    def _padded_context(self, context: SessionContext) -> dict[str, PaddedInput]:
        """SEM's summaries; the first session of the padding owns all of its tokens."""
        count = padded_size(len(context.summary) + 1)
        padded = {
            "context.summary": PaddedInput(context.summary, count),
            "context.session_offsets": PaddedInput(
                context.session_offsets, count + 1, self.sizes.history
            ),
        }
        if context.own is not None:
            padded["context.own"] = PaddedInput(context.own, self.sizes.history)
        return padded

    def _padded_payload(self, name: str, values: Tensor) -> PaddedInput:
        """Contextual features have no rows for the users of the padding."""
        features, sizes = self._features, self.sizes
        if name in features.side_embeddings:
            return PaddedInput(values, sizes.history + sizes.candidates)
        if name in features.of_history:
            return PaddedInput(values, sizes.history)
        if name in features.of_candidates:
            return PaddedInput(values, sizes.candidates)
        if name.removesuffix("_offsets") in features.contextual:
            if name.endswith("_offsets"):
                return PaddedInput(values, sizes.users + 1)
            return PaddedInput(values, padded_size(len(values)))
        raise RuntimeError(f"the host hands on an unknown payload {name!r}")

    def _payloads(self, copies: dict[str, Tensor]) -> dict[str, Tensor]:
        """The host's payloads, without those that are made here."""
        given = {
            name.removeprefix(_PAYLOAD): values
            for name, values in copies.items()
            if name.startswith(_PAYLOAD)
        }
        for name in self._features.contextual:
            offsets = f"{name}_offsets"
            if offsets in given:
                given[offsets] = _repeated(given[offsets])
        return given


def _bounds(call: dict[str, Any], request: Request) -> Bounds:
    longest_row = padded_size(request.longest_row or 0)
    if is_whole(request):
        return Bounds(call["max_uih_len"], call["max_targets"], longest_row)
    most = 1 if request.by_user else padded_size(call["max_targets"])
    return Bounds(padded_size(call["max_uih_len"]), most, longest_row)


def _share(count: int, most: int) -> int:
    """How many owners `count` rows need, of which none takes more than `most`; at least one."""
    return max(1, -(-count // most))


def _repeated(offsets: Tensor) -> Tensor:
    """Offsets whose padding is 0, with the last one before that in its place."""
    return offsets.cummax(0).values


def _extended(offsets: Tensor, total: int, owners: int, padded_total: int) -> PaddedInput:
    """Offsets `[n + 1]` up to `total`, and evenly on by further owners.

    The last steps may go beyond `padded_total`: the copy is to be clamped to it.
    """
    step = _share(padded_total - total, owners + 1 - len(offsets))
    return PaddedInput(offsets.long(), owners + 1, total + step, step)


def is_whole(request: Request) -> bool:
    """Whether the histories are whole, and each candidate reads its own part of them."""
    return request.layout == "shared_history"


def can_pad(request: Request, call: dict[str, Any]) -> bool:
    """Whether a pass is one that `PaddedPass` knows: with a plan, and weights behind SiLU.

    Its sequences hold what the plan keeps of the histories and nothing else, or are whole.

    Args:
        request: of the pass.
        call: the arguments of the transducer's forward.
    """
    if request.plan is None or request.longest_row is None or request.mask_position != "post":
        return False
    if is_whole(request):
        return call["max_uih_len"] > 0 and call["max_targets"] > 0
    by_user = not request.by_user or request.parts.one_candidate_each
    return request.layout == "per_candidate" and request.places is not None and by_user
