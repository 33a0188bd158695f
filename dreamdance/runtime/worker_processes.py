"""Processes that read or write data for this one."""

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
    """How workers are started: forked from a server process that was started clean and has imported `modules`.

    Forking this process, with the threads of DeepSpeed, gloo, CUDA or OpenCV in it, can leave a worker waiting for a
    lock that nobody holds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def start_worker(worker_id: int = 0) -> None:
    """Makes this process a worker: one thread, and gone when the process that it works for is gone.

    Neither torch's nor Python's workers notice that when a server has forked them, so a killed run would leave them.
    """
    with contextlib.suppress(OSError):  # for whoever looks with `ps` or `top`
        Path("/proc/self/comm").write_text(WORKER_NAME)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _leave_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
