"""Imported once by the fork server of `workers.py`, before it forks workers. Never import it elsewhere."""

import signal

import mmpeft_ds.data.stream  # noqa: F401 - torch and the decoders are loaded here once for all workers

# A signal to the whole process group must not end the server: its workers would follow before the run has saved.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
