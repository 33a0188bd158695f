"""Signals are received while the main thread can run no handler, and processes started meanwhile ignore them."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

from dreamdance.runtime.signals import STOP_SIGNALS, SignalListener


def test_a_signal_is_received_while_the_main_thread_waits_in_c_code(tmp_path):
    program = f"""
import ctypes, os
from pathlib import Path
from dreamdance.runtime.signals import SignalListener

def received(number):
    Path({str(tmp_path / "received")!r}).write_text(number.name)
    os._exit(7)

with SignalListener(received):
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).sleep(1000)  # as inside a collective: Python runs no handler before it returns
"""
    process = subprocess.Popen([sys.executable, "-P", "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    assert process.wait(timeout=20) == 7
    assert (tmp_path / "received").read_text() == "SIGUSR2"


def test_every_listed_signal_is_reported_in_order_and_others_are_not():
    received, done = [], threading.Event()

    def remember(number):
        received.append(number)
        if len(received) == 3:
            done.set()

    with SignalListener(remember):
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM):
            before = len(received)
            os.kill(os.getpid(), number)
            while len(received) == before:
                time.sleep(0.001)
        assert done.wait(5)
    assert received == [signal.SIGTERM, signal.SIGUSR2, signal.SIGTERM]


def test_previous_handlers_and_mask_are_restored():
    before = [signal.getsignal(number) for number in STOP_SIGNALS], signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with SignalListener(lambda number: None):
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) >= set(STOP_SIGNALS)
    assert (
        [signal.getsignal(number) for number in STOP_SIGNALS],
        signal.pthread_sigmask(signal.SIG_BLOCK, []),
    ) == before


def test_a_nested_listener_receives_signals_until_it_ends():
    outer, inner = [], []
    with SignalListener(outer.append):
        with SignalListener(inner.append):
            os.kill(os.getpid(), signal.SIGUSR2)
            while not inner:
                time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGUSR2)
        while not outer:
            time.sleep(0.001)
    assert (outer, inner) == ([signal.SIGUSR2], [signal.SIGUSR2])


def test_a_process_started_meanwhile_is_not_killed_by_the_warning():
    with SignalListener(lambda number: None):
        child = subprocess.Popen([sys.executable, "-c", "print('up', flush=True); input()"], stdin=-1, stdout=-1)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGUSR2)
    child.communicate(b"\n", timeout=10)
    assert child.returncode == 0


def test_workers_and_the_server_that_forks_them_survive_signals_to_the_whole_job():
    program = """
import multiprocessing, os, signal, sys
from multiprocessing import forkserver
from dreamdance.runtime.signals import SignalListener

def work(pipe):
    pipe.send("up")
    pipe.send(pipe.recv())

if __name__ == "__main__":
    with SignalListener(lambda number: None):
        context = multiprocessing.get_context("forkserver")
        here, there = context.Pipe()
        worker = context.Process(target=work, args=(there,))
        worker.start()
        assert here.recv() == "up"
        for number in (signal.SIGTERM, signal.SIGUSR2):
            os.kill(worker.pid, number)
            os.kill(forkserver._forkserver._forkserver_pid, number)
        here.send("done")
        assert here.recv() == "done"
        worker.join()
        sys.exit(worker.exitcode)
"""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:  # the worker imports it
        file.write(program)
        file.flush()
        done = subprocess.run([sys.executable, file.name], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
