"""This job among the jobs of its run: with `cluster.array`, the members of one Slurm array share the run's items."""

import os
from dataclasses import dataclass
from pathlib import Path

# Set by the batch script: the array's id and the member's number, such as `42_1`.
MEMBER = "DREAMDANCE_MEMBER"


@dataclass(frozen=True)
class ArrayMember:
    """A member of an array whose jobs share one run.

    Attributes:
        array: the array's id in Slurm.
        number: which of its jobs this is, counted from 0.
    """

    array: str
    number: str


def array_member() -> ArrayMember | None:
    """The member that this process belongs to; None in a run of one job."""
    array, _, number = os.environ.get(MEMBER, "").rpartition("_")
    return ArrayMember(array, number) if array else None


def sharing(run_folder: Path) -> str | None:
    """Names the jobs with which this one shares its locks; None in a run of one job."""
    member = array_member()
    return None if member is None else f"the jobs of array {member.array} of {run_folder.absolute()}"


def mark_all_done(run_folder: Path) -> None:
    """Tells members that begin later that nothing is left to do; the next submission removes the mark."""
    all_done_file(run_folder).touch()


def is_all_done(run_folder: Path) -> bool:
    """Whether this is a member of an array whose other members have done all items of the run."""
    return array_member() is not None and all_done_file(run_folder).exists()


def all_done_file(run_folder: Path) -> Path:
    return run_folder / "logs" / "all_items_done"
