"""One process at a time, also on file systems without locks; the lock of a killed process is free again."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.fault_log import record_fault

from dreamdance.errors import UserError, is_transient
from dreamdance.launch.run_folder import locked
from dreamdance.runs import locks
from dreamdance.runs.folder_lock import OutputError, lock_folder
from dreamdance.runs.locks import HeldLockError, locked_file

NO_LOCKS = [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK]
# The program of a process on such a file system; arguments: the lock, the errno, and the times of the heartbeat.
WITHOUT_LOCKS = """
import errno, fcntl, os, sys, time
from pathlib import Path
from dreamdance.runs import locks

def refuse(*_):
    raise OSError(int(sys.argv[2]), os.strerror(int(sys.argv[2])))

fcntl.flock = refuse
locks.BEAT_SECONDS, locks.SILENT_SECONDS, locks.SLOW_POLL_SECONDS = float(sys.argv[3]), float(sys.argv[4]), 0.01
"""
HOLD = (
    WITHOUT_LOCKS
    + """
with locks.locked_file(Path(sys.argv[1]), wait_seconds=0):
    print("held", flush=True)
    time.sleep(600)
"""
)
HOLD_BY_ANOTHER_CLOCK = HOLD.replace(
    "fcntl.flock = refuse",
    """fcntl.flock, touch = refuse, os.utime
os.utime = lambda file, *_: touch(file, (time.time() + float(sys.argv[5]),) * 2)""",
)
COUNT = (
    WITHOUT_LOCKS
    + """
for _ in range(int(sys.argv[5])):
    with locks.locked_file(Path(sys.argv[1]), wait_seconds=300):
        counter = Path(sys.argv[1]).with_name("counter")
        number = int(counter.read_text())
        time.sleep(0.001)
        counter.write_text(str(number + 1))
"""
)


@pytest.fixture(params=[None, *NO_LOCKS], ids=lambda number: errno.errorcode.get(number, "locks"))
def file_system(request, monkeypatch):
    """The real one, or one that answers `flock` as those without locks do; heartbeats are quick."""
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "SLOW_POLL_SECONDS", 0.01)
    if request.param is not None:
        monkeypatch.setattr(fcntl, "flock", refusing(request.param))
    return request.param


def refusing(number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    return flock


def process(program, *arguments):
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def test_one_process_at_a_time_holds_the_lock_and_the_next_follows(tmp_path, file_system):
    order = []

    def second():
        with locked_file(tmp_path / "lock", wait_seconds=60):
            order.append("second")

    with ThreadPoolExecutor() as pool:
        with locked_file(tmp_path / "lock", wait_seconds=0):
            with pytest.raises(HeldLockError, match=r"holds .*lock"), locked_file(tmp_path / "lock", wait_seconds=0.2):
                pass
            waiting = pool.submit(second)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
            order.append("first")
        waiting.result(60)
    assert order == ["first", "second"]
    with locked_file(tmp_path / "lock", wait_seconds=0, remove=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_every_user_of_locks_works_without_them(tmp_path, file_system):
    with locked(tmp_path), pytest.raises(UserError, match="another launcher has been starting") as raised:
        locked(tmp_path, wait_seconds=0.1).__enter__()
    assert is_transient(raised.value)
    with lock_folder(tmp_path / "results", key="output"):
        assert (tmp_path / "results").is_dir()
    assert list((tmp_path / "results").iterdir()) == []


def test_an_error_inside_the_lock_is_not_reported_as_missing_locks(tmp_path, file_system):
    """`is_transient` looks at the causes of an error: missing locks must not be among them."""
    with pytest.raises(UserError) as raised, locked_file(tmp_path / "lock", wait_seconds=0):
        raise UserError("a wrong manifest")
    assert not is_transient(raised.value)


def test_a_folder_that_is_not_there_is_an_error_and_is_not_made(tmp_path, file_system):
    with pytest.raises(FileNotFoundError):
        locked_file(tmp_path / "nowhere" / "lock", wait_seconds=0).__enter__()
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_without_locks_a_living_process_keeps_its_file_and_a_killed_one_loses_it(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refusing(number))
    monkeypatch.setattr(locks, "SLOW_POLL_SECONDS", 0.02)
    monkeypatch.setattr(locks, "SILENT_SECONDS", 1.5)
    with process(HOLD, tmp_path / ".claimed", number, 0.1, 1.5) as holder:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr("dreamdance.runs.folder_lock.WAIT_SECONDS", 2.0)
        start = time.monotonic()
        with pytest.raises(OutputError, match=rf"another run is writing into .*process {holder.pid} holds") as raised:
            lock_folder(tmp_path, key="output").__enter__()
        assert time.monotonic() - start >= 2.0, "longer than the wait for a process without heartbeat"
        holder.send_signal(signal.SIGKILL)
        assert holder.wait() == -signal.SIGKILL
    start = time.monotonic()
    with lock_folder(tmp_path, key="output"):
        seconds = time.monotonic() - start
        assert 0.5 < seconds < 20
    assert list(tmp_path.iterdir()) == []
    record_fault(
        "file system without locks",
        how=f"`flock` answers {errno.errorcode[number]}; a second run beside the first, then the first is killed",
        promised="the second is refused by name; the lock of the killed one is free some time after its last heartbeat",
        happened=str(raised.value).replace(str(tmp_path), "results"),
        detected_seconds=seconds,
    )


@pytest.mark.parametrize("seconds_ahead", [-3600, 3600])
def test_a_living_process_whose_machine_has_another_clock_keeps_its_lock(tmp_path, monkeypatch, seconds_ahead):
    """Lustre sets the time of a file by the clock of the machine that writes it."""
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS))
    monkeypatch.setattr(locks, "SLOW_POLL_SECONDS", 0.02)
    with process(HOLD_BY_ANOTHER_CLOCK, tmp_path / "lock", errno.ENOSYS, 0.1, 60, seconds_ahead) as holder:
        assert holder.stdout.readline() == "held\n"
        while abs(time.time() - (tmp_path / "lock.held").stat().st_mtime) < 1800:
            time.sleep(0.02)
        try:
            with pytest.raises(HeldLockError, match=f"process {holder.pid} holds"):
                locked_file(tmp_path / "lock", wait_seconds=0.5).__enter__()
        finally:
            holder.kill()


@pytest.mark.distributed
def test_processes_without_locks_exclude_one_another(tmp_path):
    (tmp_path / "counter").write_text("0")
    counting = [process(COUNT, tmp_path / "lock", errno.ENOSYS, 5, 60, 25) for _ in range(3)]
    assert [one.wait(120) for one in counting] == [0, 0, 0]
    assert (tmp_path / "counter").read_text() == "75"


def test_many_processes_take_over_the_lock_of_a_lost_one_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refusing(errno.ENOSYS))
    monkeypatch.setattr(locks, "SLOW_POLL_SECONDS", 0.002)
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.6)
    inside, most = [], []

    def take():
        with locked_file(tmp_path / "lock", wait_seconds=60):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.002)
            inside.pop()

    for round_number in range(4):
        (tmp_path / "lock.held").write_text("lost process 1")
        os.utime(tmp_path / "lock.held", (0, 0))
        if round_number % 2:
            (tmp_path / "lock.held.taken").touch()
            os.utime(tmp_path / "lock.held.taken", (0, 0))
        with ThreadPoolExecutor(8) as pool:
            for taking in [pool.submit(take) for _ in range(8)]:
                taking.result(60)
    assert len(most) == 32
    assert set(most) == {1}
