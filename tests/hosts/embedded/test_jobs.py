"""Several jobs at a time: what happens where one of them fails."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpgr_plugin.errors import HpgrError
from hpgr_plugin.hosts.embedded.report.evaluation import Task
from hpgr_plugin.hosts.embedded.report.jobs import Job, JobPool


class Marks(JobPool[Job, str]):
    """A job leaves a file with its title; "fails" and "dies" do as they say."""

    def run_one(self, job: Job) -> str:
        """See `JobPool.run_one`."""
        if job.title == "dies":
            os._exit(1)
        if job.title == "fails":
            (self.output_dir / "fails").touch()
            raise HpgrError("this job fails")
        if job.title == "beside":
            while not (self.output_dir / "fails").exists():
                time.sleep(0.01)
            time.sleep(1.0)  # ends after the error has arrived
        (self.output_dir / job.title).touch()
        return job.title


def jobs_of(*titles: str) -> list[Job]:
    return [Job("base", title, 0) for title in titles]


def test_no_job_begins_after_one_that_failed(
    configure: Callable[..., Task], tmp_path: Path
) -> None:
    pool = Marks(configure(), tmp_path, resume=False, workers=2)
    with pytest.raises(HpgrError, match="this job fails"):
        list(pool.run(jobs_of("fails", "beside", "third", "fourth", "fifth")))
    assert {path.name for path in tmp_path.iterdir()} == {"fails", "beside"}


def test_a_killed_worker_is_one_line_with_what_it_trained(
    configure: Callable[..., Task], tmp_path: Path
) -> None:
    pool = Marks(configure(), tmp_path, resume=False, workers=2)
    message = r"run.workers = 2: a worker was killed .*: dies \(seed 0\);"
    with pytest.raises(HpgrError, match=message):
        list(pool.run(jobs_of("dies")))


def test_every_job_has_its_result(configure: Callable[..., Task], tmp_path: Path) -> None:
    titles = ["a", "b", "c", "d", "e"]
    pool = Marks(configure(), tmp_path, resume=False, workers=2)
    found = {job.title: result for job, result in pool.run(jobs_of(*titles))}
    assert found == {title: title for title in titles}
