"""TODO."""

import signal
import threading

STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
]  # Windows has two


def ignore_stop_signals(worker):
    """A signal to the whole process group asks the trainer to save and stop; its workers serve until it has."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def until_signal(iterable, stop):
    """Iterates; meanwhile the first SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) puts its number into the list `stop` and does nothing else."""

    def note(number, frame):
        stop.append(number)
        signal.signal(number, before[number])  # a second one does what it always did

    main_thread = (
        threading.current_thread() is threading.main_thread()
    )  # only there may handlers be set
    before = {number: signal.signal(number, note) for number in STOP_SIGNALS} if main_thread else {}
    try:
        yield from iterable
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
