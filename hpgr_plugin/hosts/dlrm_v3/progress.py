"""What a training prints: the host logs its metrics, but keeps the losses to TensorBoard."""

import logging
from typing import Any

from generative_recommenders.dlrm_v3.utils import MetricsLogger

logger = logging.getLogger(__name__)
_MetricsLogger: Any = MetricsLogger


class LossLogger(_MetricsLogger):
    """The host's metrics logger, which also logs the loss of every task as a line."""

    def compute_and_log(self, mode: str = "train", additional_logs: Any = None) -> Any:
        """See the host's method of this name; `additional_logs["losses"]` is logged."""
        losses = (additional_logs or {}).get("losses", {})
        if losses:
            text = ", ".join(f"{task} {value.item():.4f}" for task, value in losses.items())
            logger.info("%s - Step %d loss: %s", mode, self.global_step[mode], text)
        return super().compute_and_log(mode=mode, additional_logs=additional_logs)
