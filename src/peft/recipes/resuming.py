"""Whether the run that an output folder holds may be gone on with, or its record written over."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from ..errors import UserError
from . import ranks, saved
from .job import Job
from .outputs import Output


def written_job(output: Output) -> object:
    """What the record of the job in the folder says; None where there is none."""
    file = output.path(saved.JOB)
    if not file.is_file():
        return None
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError:
        return {}


def check_record(job: Job, output: Output, made: object) -> None:
    """A record that somebody has changed is not written over, unless it says what this job says."""
    if not isinstance(made, dict) or not made or job.differences(made):
        output.refuse_what_is_in_the_way(saved.JOB)


def check_same(job: Job, now: Mapping[str, str], output: Output, made: object) -> None:
    """The run to go on with is one of this job, on the same rows and the same base (digests `now`), in as many processes."""
    recorded = yaml.safe_load(str(output.notes["job"])) if "job" in output.notes else made
    if not isinstance(recorded, dict) or not recorded:
        raise UserError(
            f"{output.path(saved.JOB)} is empty or cut short, so it is not known which job was interrupted here. Give "
            "another --output, or put the file back."
        )
    other = job.differences(recorded)
    if other:
        raise UserError(
            f"{output.folder} holds an interrupted run of another job: it differs in {', '.join(other)}. "
            "Give the same job to go on, another --output, or --restart to discard it."
        )
    processes = output.notes.get("processes", 1)
    if processes != ranks.count():
        raise UserError(
            f"{output.folder} holds a run of {processes} processes, and now there are {ranks.count()}: each step would see "
            "other rows. Start it with as many, give another --output, or --restart to train anew."
        )
    read = dict(output.notes.get("read") or {})
    for name, found in now.items():
        if read.get(name, found) != found:
            raise UserError(
                f"{name} has changed since the run in {output.folder} began, which is to go on. Put the file back as it "
                "was, give another --output, or --restart to train anew on what it holds now."
            )
