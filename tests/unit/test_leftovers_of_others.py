"""Files of a killed run of another user: the next start continues, or names the file that it cannot replace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.fault_log import record_fault
from support.random_shards import write_random_shards

from dreamdance.launch.run_folder import LOCK_FILE
from dreamdance.runs.folder_lock import FOLDER_LOCK_FILE

ROOT = Path(__file__).parents[2]
SHARD = "part_00000.shard.00000.mds"
TEMPORARY = ".part_00000.shard.00000.partial.mds"  # its name before it is complete
ANOTHER_USER = 12_345
CLIPS = 8

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files to another user")

# Starts of a user without permissions on files of others; the result of each is written as a line of JSON.
STARTS = """
import contextlib, ctypes, io, json, sys
from pathlib import Path
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.errors import UserError
from dreamdance.runs.folder_lock import lock_folder
from dreamdance.launch.command import main
from dreamdance.recipe.sections import Shards

# Drops all capabilities, because file permissions do not stop root: `capset` with empty sets.
header = (ctypes.c_uint32 * 2)(0x20080522, 0)
assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0

def read(folder):
    return f"{len(list(StoredClips(Shards(local=folder, remote=sys.argv[1]))))} clips"

def claim(folder):
    with lock_folder(Path(folder), key="output"):
        return "claimed"

def launch(folder):
    words = ["recipes/demo/prepare.yaml", "name=run", "--runs", folder, "--cluster", "local"]
    with contextlib.redirect_stderr(io.StringIO()) as output:
        code = main(words, lambda *_: "")
    return f"code {code}: {output.getvalue()}"

for name, folder in zip(sys.argv[2::2], sys.argv[3::2]):
    try:
        print(json.dumps(globals()[name](folder)))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def leave(path: Path) -> None:
    """A file of another user, readable by all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"left")
    path.chmod(0o644)
    os.chown(path, ANOTHER_USER, ANOTHER_USER)


@pytest.mark.slow
def test_leftovers_of_another_user_are_replaced_or_named_with_the_way_around_them(tmp_path):
    remote = tmp_path / "remote"
    write_random_shards(remote, CLIPS)
    for name, mode in (
        ("open_to_all", 0o777),
        ("sticky", 0o1777),
    ):  # in the latter each user can remove only their own files
        leave(tmp_path / name / TEMPORARY)
        os.chown(tmp_path / name, ANOTHER_USER, ANOTHER_USER)
        (tmp_path / name).chmod(mode)
    leave(tmp_path / "cache" / f".{SHARD}.lock")
    leave(tmp_path / "output" / FOLDER_LOCK_FILE)
    leave(tmp_path / "runs" / "run" / LOCK_FILE)
    starts = [("read", "open_to_all"), ("read", "sticky"), ("read", "cache"), ("claim", "output"), ("launch", "runs")]
    words = [word for name, folder in starts for word in (name, tmp_path / folder)]
    done = subprocess.run(
        [sys.executable, "-c", STARTS, remote, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    went_on, sticky, locked, claimed, launched = map(json.loads, done.stdout.splitlines())
    assert went_on == f"{CLIPS} clips"
    for output, file, way in (
        (sticky, f"sticky/{TEMPORARY}", "set a `local` folder that can be written"),
        (locked, f"cache/.{SHARD}.lock", "set a `local` folder that can be written"),
        (claimed, f"output/{FOLDER_LOCK_FILE}", "give another `output`"),
        (launched, f"runs/run/{LOCK_FILE}", "give another --runs"),
    ):
        assert str(tmp_path / file) in output
        assert way in output
    assert launched.startswith("code 2: ")
    record_fault(
        "leftovers of another user's killed run",
        how="half a download and locks of a shard, a result folder and a run, of another uid; no permissions on them",
        promised="the start succeeds, or names the file that it cannot replace and what to do",
        happened=f"the half file was replaced where the folder allowed it; else: {locked.replace(str(tmp_path), '')}",
    )
