"""The trainings of an ablation as jobs, one after another or several at a time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from hpgr_plugin.config.bindings import as_text, restore
from hpgr_plugin.config.registry import build, register
from hpgr_plugin.config.scopes import config_scope
from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.train.distributed import Process
from hpgr_plugin.hosts.embedded.train.stages import Stage1, finetune, pretrain
from hpgr_plugin.hosts.embedded.train.trainer import TrainingRun


@dataclass(frozen=True)
class Job:
    """One training: stage 1 of a scope, or stage 2 of a row.

    Attributes:
        scope: gin scope in which everything is built.
        title: label of its progress.
        seed: of the training.
        is_stage1: which stage.
        handoff: what stage 2 starts from; None leaves the slot to gin.
        learning_rate: of stage 2 in place of the bound one; None for the bound one.
    """

    scope: str
    title: str
    seed: int
    is_stage1: bool = False
    handoff: Path | None = None
    learning_rate: float | None = None

    @property
    def folder(self) -> str:
        """Where it writes, below the folder of the ablation."""
        rate = "" if self.learning_rate is None else f"_lr{self.learning_rate:g}"
        return f"{self.scope}{rate}_seed{self.seed}"


Result = Stage1 | dict[str, Any]


class AnyJob(Protocol):
    """What a pool reads of a job."""

    @property
    def title(self) -> str: ...

    @property
    def seed(self) -> int: ...


J = TypeVar("J", bound=AnyJob)
R = TypeVar("R")


@dataclass(frozen=True)
class JobPool(ABC, Generic[J, R]):
    """Runs jobs of type J with results of type R.

    Attributes:
        task: data, requests and metrics.
        output_dir: of the ablation.
        resume: continue from the last checkpoints.
        workers: processes that train at the same time. 1 trains in this one, with all cores;
            several share the cores, and the CUDA devices by turns.
    """

    task: Task
    output_dir: Path
    resume: bool
    workers: int = 1

    @abstractmethod
    def run_one(self, job: J) -> R:
        """Train in this process."""

    def run(self, jobs: Sequence[J]) -> Iterator[tuple[J, R]]:
        """Each job with its result, as they finish.

        Args:
            jobs: none needs the result of another.

        Raises:
            HpgrError: a worker was killed. What a job raises is raised too, after the jobs that
                run beside it; those that wait are not begun.
        """
        if self.workers == 1:
            for job in jobs:
                yield job, self.run_one(job)
            return
        with ProcessPoolExecutor(
            max_workers=min(self.workers, max(1, len(jobs))),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(replace(self, workers=1), as_text(), self.workers),
        ) as pool:
            waiting, running = iter(jobs), dict[Future[R], J]()
            while True:
                # A pool trains all that it was given before it ends, also after an error: it gets
                # no more jobs than it has workers.
                for job in islice(waiting, self.workers - len(running)):
                    running[pool.submit(_run_in_worker, job)] = job
                if not running:
                    return
                finished = wait(running, return_when=FIRST_COMPLETED).done
                try:
                    results = [(running[future], future.result()) for future in finished]
                except BrokenProcessPool as error:
                    raise self._killed(list(running.values())) from error
                for future in finished:
                    del running[future]
                yield from results

    def _killed(self, running: Sequence[J]) -> HpgrError:
        titles = ", ".join(f"{job.title} (seed {job.seed})" for job in running)
        return HpgrError(
            f"hpgr.run.workers = {self.workers}: a worker was killed while these were trained: "
            f"{titles}; if the memory ran out, take fewer workers"
        )

    def training(self, folder: str, title: str, seed: int) -> TrainingRun:
        """A training that writes to a folder of the ablation."""
        return TrainingRun(
            seed=seed,
            output_dir=self.output_dir / folder,
            process=self.task.process,
            title=f"{title} (seed {seed})",
            resume=self.resume,
        )


class Jobs(JobPool[Job, Result]):
    """The jobs of an ablation of rankers: a `Stage1` for stage 1, metrics for stage 2."""

    def run_one(self, job: Job) -> Result:
        """See `JobPool.run_one`."""
        run = self.training(job.folder, job.title, job.seed)
        with config_scope(job.scope):
            if job.is_stage1:
                return pretrain(self.task, build("PretrainSettings"), run)
            settings = build("FinetuneSettings")
            if job.learning_rate is not None:
                settings = replace(settings, learning_rate=job.learning_rate)
            task = replace(self.task, requests=build("RequestSettings"))
            return finetune(task, settings, run, pretrained=job.handoff)


_jobs: JobPool[Any, Any] | None = None


def _start_worker(jobs: JobPool[Any, Any], bindings: str, workers: int) -> None:
    """The configuration, device and share of the cores of a worker."""
    global _jobs
    threading.Thread(target=_end_with_parent, daemon=True).start()
    register("components", "data", "embedded")
    restore(bindings)
    build("set_backends")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    device = jobs.task.process.device
    if device.type == "cuda":
        (number,) = multiprocessing.current_process()._identity
        device = torch.device("cuda", (number - 1) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    _jobs = replace(jobs, task=replace(jobs.task, process=Process(0, 1, device)))


def _end_with_parent() -> None:
    """End this process when the one that started it has ended, which a killed one does unseen.

    A worker would train on, beside the run that resumes it. Files are written whole or not at all.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _run_in_worker(job: Any) -> Any:
    assert _jobs is not None
    result = _jobs.run_one(job)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result
