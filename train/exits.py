"""Exit codes of train/run.py."""

FINISHED = 0
USER_ERROR = 2  # one line says what to set right
DIVERGED = 3  # the loss or gradient is no longer a number; the last good checkpoint is intact
UNSAVED = (
    74  # storage failed for too long, or for the last save (EX_IOERR): the same command goes on from what was saved
)
STOPPED = 75  # stopped before the end by a signal, resumable (EX_TEMPFAIL)
FENCED = 76  # another trainer has taken the run over
