"""Asking a program to stop: Ctrl-C, a scheduler's SIGTERM, Slurm's SIGUSR1 before time is up."""

import signal
import threading

STOP_SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGUSR1"):  # not on Windows
    STOP_SIGNALS.append(signal.SIGUSR1)


def ignore_stop_signals(worker):
    """For a worker process. A signal to the whole group asks the main process to save and stop; its
    workers serve it until it has.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def noting_signals(iterable, signals):
    """Iterates over all of it. Meanwhile a stop signal is only noted, in the list `signals`.

    A second one does what it always did.
    """

    def note(number, frame):
        signals.append(number)
        signal.signal(number, before[number])

    before = {}
    if threading.current_thread() is threading.main_thread():  # only there may handlers be set
        before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield from iterable
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
