"""Starts worker processes, which read or write data for this process."""

import contextlib
import multiprocessing
import os
import threading
from multiprocessing import connection
from multiprocessing.context import ForkServerContext
from pathlib import Path

import cv2
import torch

WORKER_NAME = "data worker"


def worker_context(*modules: str) -> ForkServerContext:
    """Returns a context that forks workers from a server process, which has no threads and has imported `modules`.

    This process itself has threads of DeepSpeed, gloo, CUDA or OpenCV. A worker forked from it can wait forever for a
    lock that one of these threads held.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def start_worker(worker_id: int = 0) -> None:
    """Sets this process up as a worker: it uses one thread for computing, and exits when its parent process ends.

    Workers of torch and of Python do not notice the parent's end if a server has forked them: after a killed run they
    would remain.
    """
    with contextlib.suppress(OSError):  # the name that `ps` and `top` show
        Path("/proc/self/comm").write_text(WORKER_NAME)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
