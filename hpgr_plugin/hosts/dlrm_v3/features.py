"""The features that the slots read, by the names in the host's configuration."""

from typing import Any

from torch import Tensor

from hpgr_plugin.hosts.dlrm_v3.selection import RankingBatch
from hpgr_plugin.ops.compact.parts import SequenceParts, joined_parts

# Payloads that this package adds: item ids for a hook with a frozen table.
HISTORY_IDS = "hpgr_history_ids"
CANDIDATE_IDS = "hpgr_candidate_ids"


class Features:
    """What a batch of the host's ranking model holds for the slots.

    Args:
        config: The host's `DlrmHSTUConfig`.
    """

    def __init__(self, config: Any) -> None:
        self._config = config

    @property
    def time(self) -> str:
        """The feature with the times of the history items."""
        return str(self._config.uih_action_time_feature_name)

    @property
    def query_time(self) -> str:
        """The feature with the times of the candidates."""
        return str(self._config.candidates_querytime_feature_name)

    @property
    def items(self) -> tuple[str, str]:
        """The item feature in the history and in the candidates."""
        history = self._config.uih_post_id_feature_name
        mapping = dict(self._config.merge_uih_candidate_feature_mapping)
        return history, mapping[history]

    @property
    def of_history(self) -> list[str]:
        """The features that have one row per history item."""
        return [name for name, _ in self._config.merge_uih_candidate_feature_mapping]

    @property
    def of_candidates(self) -> list[str]:
        """The features that have one row per candidate."""
        return [name for _, name in self._config.merge_uih_candidate_feature_mapping]

    @property
    def side_embeddings(self) -> list[str]:
        """Looked-up features of the items, one row per row of the sequences."""
        looked_up = self._config.user_embedding_feature_names
        return [name for name in self.of_history if name in looked_up]

    @property
    def contextual(self) -> list[str]:
        """The features of the tokens in front of every history."""
        return list(self._config.contextual_feature_to_max_length)

    @property
    def contextual_len(self) -> int:
        """Tokens in front of every history."""
        return sum(self._config.contextual_feature_to_max_length.values())

    @property
    def min_lengths(self) -> dict[str, int]:
        """Contextual features that count from a length of the sequence on."""
        least = self._config.contextual_feature_to_min_uih_length
        names = self._config.contextual_feature_to_max_length
        return {name: least[name] for name in names if least.get(name, 0) > 0}

    def times(self, batch: RankingBatch) -> tuple[Tensor, Tensor]:
        """Times of the history items `[T]` and of the candidates `[C]`."""
        return batch.payload_features[self.time], batch.payload_features[self.query_time]

    def one_candidate_each(self, batch: RankingBatch) -> bool:
        """Whether every user has exactly one candidate, as far as is known without a wait."""
        one_at_most = batch.max_num_candidates == 1
        return one_at_most and len(self.times(batch)[1]) == len(batch.num_candidates)

    def parts(
        self, batch: RankingBatch, history_offsets: Tensor, num_history: int
    ) -> SequenceParts:
        """Of the sequences with these histories and the batch's candidates."""
        return joined_parts(
            history_offsets,
            batch.candidate_offsets,
            contextual_len=self.contextual_len,
            num_history=num_history,
            num_candidates=len(self.times(batch)[1]),
            one_candidate_each=self.one_candidate_each(batch),
        )
