"""Exit codes of train/run.py."""

FINISHED = 0
USER_ERROR = 2  # one line says what to set right
DIVERGED = 3  # the loss or gradient is no longer a number; the last good checkpoint is intact
UNSAVED = (
    74  # EX_IOERR: storage was away for too long, at the start, in the middle or for the last save: try again later
)
STOPPED = 75  # EX_TEMPFAIL: told to stop before the end; the same command goes on
FENCED = 76  # another trainer has taken the run over
LOST = 77  # another process of the same run has died: torchrun --max-restarts starts all of them again

MEANINGS = (
    "0 finished; 2 something you can set right; 3 diverged; 74 storage did not answer, 75 stopped: with --resume the "
    "same command goes on; 76 another trainer has taken over; 77 another process of this run died; 128 + n ended by a "
    "second signal n"
)
