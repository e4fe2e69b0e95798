"""`Scorer`: requests in the log's ids to probabilities, as the trainer's evaluation gives them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hpgr_plugin.hosts.embedded.model.encoder import SequenceEncoder
from hpgr_plugin.serving.cached_encoder import CachedEncoder
from hpgr_plugin.serving.captured import CapturedCandidates
from hpgr_plugin.serving.folder import ServedModel, read_folder
from hpgr_plugin.serving.history_cache import HistoryCache, HistoryState
from hpgr_plugin.serving.kept_candidates import KeptCandidates
from hpgr_plugin.serving.kept_rows import ServedPreferences, can_plan
from hpgr_plugin.serving.requests import (
    EncodedCandidates,
    EncodedRequest,
    HistoryNotKeptError,
    Request,
    batch_of,
    encode,
)
from hpgr_plugin.serving.vocabulary import RequestError

_MIB = 2**20


@dataclass(frozen=True)
class Scores:
    """The answer to one request.

    Attributes:
        probabilities: float32 [C], NaN for candidates that the log does not have.
        unknown_candidates: places of those candidates.
        unknown_history: history items of the request that the log does not have; they were left
            out.
        history_length: items that were read.
        history_version: digest of what was read; equal histories have equal ones.
        tasks: the same as `probabilities` for every further task of the model, by name.
    """

    probabilities: np.ndarray
    unknown_candidates: list[int]
    unknown_history: int
    history_length: int
    history_version: str
    tasks: dict[str, np.ndarray] = field(default_factory=dict)


class Scorer:
    """Scores requests with one model.

    Items that the log does not have cannot be scored: in the history they are left out, as
    candidates they get NaN. A probability does not depend on the other candidates of the request,
    nor on requests scored with it, but for MTGR, which reads the history that all candidates of a
    request may see in another way than the rest.

    Args:
        served: model, vocabulary and settings.
        device: where the model runs.
        cache_mib: bound on the memory of kept histories; 0 encodes every history anew.
        capture: whether requests over kept histories are replayed from CUDA graphs, on a GPU.

    Attributes:
        cache: the kept histories.
        captured: their CUDA graphs, or None where there are none.
    """

    def __init__(
        self,
        served: ServedModel,
        *,
        device: str | torch.device = "cpu",
        cache_mib: int = 256,
        capture: bool = True,
    ) -> None:
        self.model = served.model.to(device)
        self.settings = served.settings
        self.vocabulary = served.vocabulary
        self.manifest = served.manifest
        self.device = torch.device(device)
        self.cache = HistoryCache(cache_mib * _MIB)
        self._encoder: CachedEncoder | None = None
        self._candidates: KeptCandidates | None = None
        self.captured: CapturedCandidates | None = None
        if cache_mib and isinstance(self.model.encoder, SequenceEncoder):
            self._encoder = CachedEncoder(self.model.encoder, self.cache)
            # Modules of another kind with the same call.
            self.model.encoder = self._encoder  # type: ignore[assignment]
            hook = self.model.attention_hook
            if can_plan(hook) and hook is not None and hook.layout == "shared_history":
                self.model.attention_hook = ServedPreferences(hook)  # type: ignore[arg-type]
            if KeptCandidates.serves(self.model):
                self._candidates = KeptCandidates(
                    self.model, self._encoder.encoder, self._encoder.bias
                )
                if capture and self.device.type == "cuda":
                    self.captured = CapturedCandidates(self._candidates)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device | None = None,
        cache_mib: int = 256,
        capture: bool = True,
    ) -> Scorer:
        """The scorer of a folder that `python -m hpgr_plugin.serving.export` wrote.

        Args:
            folder: that was written.
            device: None takes a GPU if there is one.
            cache_mib, capture: see the class.

        Raises:
            FolderError: no such folder, or a damaged one.
        """
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        served = read_folder(Path(folder))
        return cls(served, device=place, cache_mib=cache_mib, capture=capture)

    def encode(self, request: Request) -> EncodedCandidates:
        """Check a request and code it; any thread may do so.

        Raises:
            RequestError: naming the field.
        """
        use_actions = self.model.action_table is not None
        return encode(
            request,
            self.vocabulary,
            self.settings,
            use_actions=use_actions,
            hide_future=self.model.hide_future,
        )

    def score(self, requests: Sequence[Request]) -> list[Scores]:
        """The answers to some requests, scored together.

        Raises:
            HistoryNotKeptError: a request names a history that is not kept.
            RequestError: naming the field of the first request that cannot be scored.
        """
        answers = self.score_encoded([self.encode(request) for request in requests])
        scores = []
        for answer in answers:
            if isinstance(answer, RequestError):
                raise answer
            scores.append(answer)
        return scores

    @torch.inference_mode()
    def score_encoded(self, requests: Sequence[EncodedCandidates]) -> list[Scores | RequestError]:
        """The answers to some checked requests; one thread at a time.

        What keeps one of them from being scored, such as a history that is not kept any more, is
        its answer: the others are scored.
        """
        found = self._find(requests)
        chosen = {
            place: state
            for place, state in enumerate(found)
            if requests[place].known.any() and not isinstance(state, RequestError)
        }
        scores = self._probabilities(requests, chosen)
        names = self.model.task_names
        nothing = np.zeros((1 + len(names), 0), np.float32)
        answers: list[Scores | RequestError] = []
        for place, (request, state) in enumerate(zip(requests, found, strict=True)):
            if isinstance(state, RequestError):
                answers.append(state)
            else:
                answers.append(_answer(request, state, scores.get(place, nothing), names))
        return answers

    def _probabilities(
        self, requests: Sequence[EncodedCandidates], states: dict[int, HistoryState | None]
    ) -> dict[int, np.ndarray]:
        """Of all tasks and known candidates, float32 `[1 + tasks, C']`, by place of the request.

        Args:
            requests: all of them.
            states: by place of those to score; None: the model reads the history.
        """
        kept = self._ready({p: (requests[p], s) for p, s in states.items() if s is not None})
        parts = self._replayed(requests, kept)
        done = {place for part in parts for place in part.places}
        rest = [place for place in kept if place not in done]
        if rest:
            parts.append(self._launched(requests, kept, rest))
        others = [place for place, state in states.items() if state is None]
        if others:
            parts.append(self._encoded(requests, others))
        scores = _read(parts, requests)
        tied = [place for place in done if scores[place][-1].any()]
        if tied:
            scores |= _read([self._launched(requests, kept, tied)], requests)
        return {place: one[: 1 + len(self.model.task_names)] for place, one in scores.items()}

    def _replayed(
        self, requests: Sequence[EncodedCandidates], kept: dict[int, HistoryState]
    ) -> list[_Part]:
        """Requests over kept histories that CUDA graphs score; there may be ties among anchors."""
        if self.captured is None or not kept:
            return []
        found = self.captured.scores([requests[place] for place in kept], list(kept.values()))
        return [
            _Part([place], logits, ties=True)
            for place, logits in zip(kept, found, strict=True)
            if logits is not None
        ]

    def _launched(
        self,
        requests: Sequence[EncodedCandidates],
        kept: dict[int, HistoryState],
        places: list[int],
    ) -> _Part:
        """Requests over kept histories together, launch by launch."""
        assert self._candidates is not None
        logits = self._candidates.logits(
            [requests[place] for place in places], [kept[place] for place in places]
        )
        return _Part(places, logits)

    def _encoded(self, requests: Sequence[EncodedCandidates], places: list[int]) -> _Part:
        """Requests whose history the model reads."""
        others = [requests[place] for place in places]
        whole = [request for request in others if isinstance(request, EncodedRequest)]
        if not self.model.hide_future:
            whole = [one for request in whole for one in request.split()]
        if self._encoder is not None:
            self._encoder.for_users(
                [r.user for r in whole],
                [self._version(r, r.fewest_visible) for r in whole],
                [r.history for r in whole],
            )
        return _Part(places, self.model(batch_of(whole).to(self.device), every_task=True))

    # -- kept histories -----------------------------------------------------------------------

    def _find(
        self, requests: Sequence[EncodedCandidates]
    ) -> list[HistoryState | RequestError | None]:
        """The kept histories of requests that need nothing else of them, before any is dropped.

        None: the model reads the history. An error: it would have to, but the request names one.
        """
        found: list[HistoryState | RequestError | None] = []
        for request in requests:
            state = self._kept(request)
            if isinstance(request, EncodedRequest):
                found.append(state)
            else:
                found.append(self._why_not_named(request, state) or state)
        return found

    def _kept(self, request: EncodedCandidates) -> HistoryState | None:
        """The kept history of one request, if it needs nothing else of it."""
        if self._candidates is None:
            return None
        if isinstance(request, EncodedRequest) and not request.one_time:
            return None
        state = self.cache.get(request.user)
        if state is None or state.history is None:
            return None
        return state if state.version == self._version(request, state.num_items) else None

    def _why_not_named(
        self, request: EncodedCandidates, state: HistoryState | None
    ) -> RequestError | None:
        """Why a request that names its history cannot be scored over this one; None: it can."""
        if self._candidates is None:
            return HistoryNotKeptError("this model is served without kept histories")
        if state is None or state.history is None:
            return HistoryNotKeptError(
                f"history {request.version!r} is not kept for this user and these features"
            )
        times = request.candidates[1]
        if state.num_items and len(times) and times[0] <= state.history[1, -1]:
            return RequestError(
                "times",
                "takes a time after the last event of the kept history, "
                f"{state.history[1, -1]}, got {times[0]}; send the history for an earlier one",
            )
        return None

    def _ready(
        self, found: dict[int, tuple[EncodedCandidates, HistoryState]]
    ) -> dict[int, HistoryState]:
        """The same states with what requests of them need."""
        ready: dict[Hashable, HistoryState] = {}  # a user may ask twice
        for request, state in found.values():
            assert self._candidates is not None
            self.cache.counts.hits += 1
            if request.user in ready:
                continue
            if state.ready is None:
                state = self._candidates.ready(state)
                if state.num_bytes <= self.cache.max_bytes:
                    self.cache.put(request.user, state)
            ready[request.user] = state
        return {place: ready[request.user] for place, (request, _) in found.items()}

    def _version(self, request: EncodedCandidates, visible: int) -> tuple[Hashable, ...]:
        """Of all that the tokens and marks of a request's history are made from.

        Args:
            request: whose history it is.
            visible: how many items of it every candidate sees.
        """
        seen = visible if self.model.dynamic_mask else None
        return request.version, seen, *request.user_features.items()


@dataclass(frozen=True, eq=False)
class _Part:
    """Scores of some requests.

    Attributes:
        places: of the requests.
        logits: `[1 + tasks, C]`, of their known candidates in this order.
        ties: whether a last row follows, see `PaddedRequest.scores`.
    """

    places: list[int]
    logits: Tensor
    ties: bool = False


def _read(parts: Sequence[_Part], requests: Sequence[EncodedCandidates]) -> dict[int, np.ndarray]:
    """The sigmoid of each request's rows, by its place, after one wait for the device.

    Where one of the parts has a row of ties, all have: 1 for a tie, else 0.
    """
    if not parts:
        return {}
    ties = any(part.ties for part in parts)
    rows = [
        part.logits if part.ties or not ties else F.pad(part.logits, (0, 0, 0, 1), value=-math.inf)
        for part in parts
    ]
    logits = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
    scores: np.ndarray = logits.float().sigmoid().cpu().numpy()
    places = [place for part in parts for place in part.places]
    ends = np.cumsum([requests[place].candidates.shape[1] for place in places])
    return dict(zip(places, np.split(scores, ends[:-1], axis=1), strict=True))


def _answer(
    request: EncodedCandidates,
    state: HistoryState | None,
    scores: np.ndarray,
    names: Sequence[str],
) -> Scores:
    """The answer to one request.

    Args:
        request: that was scored.
        state: the history that it was found by; None: it has its own.
        scores: `[1 + tasks, C']`, of the known candidates.
        names: of the further tasks.
    """
    probabilities = np.full((len(scores), len(request.known)), np.nan, np.float32)
    probabilities[:, request.known] = scores
    if isinstance(request, EncodedRequest):
        unknown, length = request.unknown_history, request.history.shape[1]
    else:
        assert state is not None
        unknown, length = 0, state.num_items
    return Scores(
        probabilities=probabilities[0],
        unknown_candidates=np.flatnonzero(~request.known).tolist(),
        unknown_history=unknown,
        history_length=length,
        history_version=request.version,
        tasks=dict(zip(names, probabilities[1:], strict=True)),
    )
