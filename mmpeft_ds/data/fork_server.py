"""Preload of the fork server of workers.py, imported once before it forks workers. Never import it elsewhere."""

import signal

from mmpeft_ds import console

with console.quick_imports():  # a backbone's module, imported after this, does without the compiler too
    import mmpeft_ds.data.stream  # noqa: F401 - torch and the decoders are loaded here once for all workers

# Ignore a signal to the whole process group: if the server ended, so would its workers, before the run has saved.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
