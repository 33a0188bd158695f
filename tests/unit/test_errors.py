"""What a user can mend is told from what a machine or its storage did."""

import errno
import os

import pytest

from dreamdance.errors import CheckpointError, LostWorkerError, MissingInputError, UserError, is_transient
from dreamdance.recipe import load_recipe
from dreamdance.runs.folder_lock import OutputError, lock_folder


def failed(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/shared/file")


def retell(error: OSError, *, with_cause: bool) -> None:
    """Says an error in the project's words."""
    try:
        raise error
    except OSError:
        raise CheckpointError("checkpoints cannot be saved") from (error if with_cause else None)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENOMEM])
def test_what_storage_or_a_machine_did_may_pass_in_whatever_words_it_is_told(number: int) -> None:
    with pytest.raises(CheckpointError) as told:
        retell(failed(number), with_cause=True)
    assert is_transient(told.value)
    with pytest.raises(CheckpointError) as hidden:
        retell(failed(number), with_cause=False)
    assert is_transient(hidden.value)
    assert is_transient(failed(number))
    assert is_transient(LostWorkerError("a worker died"))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR])
def test_a_wrong_path_a_missing_right_and_a_full_disk_are_the_users(number: int) -> None:
    assert not is_transient(failed(number))
    assert not is_transient(MissingInputError("no weights"))
    assert not is_transient(OSError("an error of a library, which says no number"))


def test_errors_of_real_files_are_judged_by_what_the_system_said(tmp_path):
    with pytest.raises(UserError) as told:
        load_recipe(tmp_path / "nothing.yaml")
    assert not is_transient(told.value)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as refused:
        lock_folder(tmp_path / "file" / "results", key="output").__enter__()
    assert not is_transient(refused.value)
    # Reading the first page of a process's own memory: the one file in Linux that fails with EIO.
    with pytest.raises(UserError, match="cannot be read: Input/output error") as broken:
        load_recipe("/proc/self/mem")
    assert is_transient(broken.value)
