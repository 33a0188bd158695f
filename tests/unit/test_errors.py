"""Errors of the user are distinguished from transient errors of a machine or its storage."""

import errno
import os

import pytest

from dreamdance.errors import CheckpointError, LostWorkerError, MissingInputError, UserError, is_transient
from dreamdance.recipe import load_recipe
from dreamdance.runs.folder_lock import OutputError, lock_folder


def failed(number: int) -> OSError:
    return OSError(number, os.strerror(number), "/shared/file")


def raise_project_error(error: OSError, *, with_cause: bool) -> None:
    """Raises an error of the project because of another one."""
    try:
        raise error
    except OSError:
        raise CheckpointError("checkpoints cannot be saved") from (error if with_cause else None)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENOMEM])
def test_errors_of_storage_or_a_machine_are_transient_whatever_their_text(number: int) -> None:
    with pytest.raises(CheckpointError) as raised:
        raise_project_error(failed(number), with_cause=True)
    assert is_transient(raised.value)
    with pytest.raises(CheckpointError) as hidden:
        raise_project_error(failed(number), with_cause=False)
    assert is_transient(hidden.value)
    assert is_transient(failed(number))
    assert is_transient(LostWorkerError("a worker died"))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR])
def test_a_wrong_path_missing_permissions_and_a_full_disk_are_errors_of_the_user(number: int) -> None:
    assert not is_transient(failed(number))
    assert not is_transient(MissingInputError("no weights"))
    assert not is_transient(OSError("an error of a library, without an errno"))


def test_errors_of_real_files_are_classified_by_their_errno(tmp_path):
    with pytest.raises(UserError) as raised:
        load_recipe(tmp_path / "nothing.yaml")
    assert not is_transient(raised.value)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as refused:
        lock_folder(tmp_path / "file" / "results", key="output").__enter__()
    assert not is_transient(refused.value)
    # Reading the first page of a process's own memory: the only file in Linux that fails with EIO.
    with pytest.raises(UserError, match="cannot be read: Input/output error") as broken:
        load_recipe("/proc/self/mem")
    assert is_transient(broken.value)
