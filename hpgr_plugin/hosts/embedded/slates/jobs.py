"""The trainings of an ablation of slates as jobs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpgr_plugin.config.registry import build
from hpgr_plugin.config.scopes import config_scope
from hpgr_plugin.hosts.embedded.report.jobs import JobPool
from hpgr_plugin.hosts.embedded.slates.stages import TrainedSlates, align, train_slates
from hpgr_plugin.hosts.embedded.slates.tokenize import Tokenized, tokenize
from hpgr_plugin.hosts.embedded.train.stages import Stage1, pretrain

Result = Stage1 | Tokenized | TrainedSlates


@dataclass(frozen=True)
class SlateJob:
    """One training.

    Attributes:
        stage: which.
        scope: gin scope in which it is built, and the folder where it writes.
        title: label of its progress.
        seed: of the training.
        handoff: of stage 1; read by `tokenize` and `slates`.
        tokens: read by `slates` (None without a decoder) and `align`.
        model: read by `align`.
    """

    stage: Literal["pretrain", "tokenize", "slates", "align"]
    scope: str
    title: str
    seed: int
    handoff: Path | None = None
    tokens: Path | None = None
    model: Path | None = None


class SlateJobs(JobPool[SlateJob, Result]):
    """Runs them."""

    def run_one(self, job: SlateJob) -> Result:
        """See `JobPool.run_one`."""
        run = self.training(f"{job.scope}_seed{job.seed}", job.title, job.seed)
        if job.stage == "pretrain":
            return pretrain(self.task, build("PretrainSettings"), run)
        given = {} if job.tokens is None else {"tokens": str(job.tokens)}
        with config_scope(job.scope):
            if job.stage == "tokenize":
                settings = build("TokenizeSettings", embeddings=str(job.handoff))
                return tokenize(self.task.data, settings, run)
            if job.stage == "align":
                settings = build("AlignSettings", model=str(job.model), **given)
                return align(self.task, settings, run)
            settings = build("SlateSettings", **given)
            return train_slates(self.task, settings, run, pretrained=job.handoff)
