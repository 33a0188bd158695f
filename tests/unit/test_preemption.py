"""A request to stop is remembered, never acted upon in the handler, and handed on after the save."""

import os
import signal

import pytest

from dreamdance.training.preemption import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_nothing_else_happens(number):
    with StopRequest() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.received is number


def test_the_handlers_of_before_come_back():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) not in before
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_the_launchers_handler_is_called_once_the_run_is_saved():
    called = []
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert called == [], "not while the run is unsaved"
        stop.hand_over()
        assert called == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, previous)


def test_without_a_handler_of_before_handing_over_does_nothing():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
    stop.hand_over()
    StopRequest().hand_over()
    assert stop, "the request itself is remembered"
