"""The family of errors that end a program with one line and exit code 2."""

from gpt.errors import GPTError
from store.errors import StoreError


class UserError(Exception):
    """Something the user can set right; the message says what was found, what was expected and what to do."""


class Unfinished(UserError):
    """Work that was stopped from outside: what is finished stays, and the same command goes on from there."""


USER_ERRORS = (UserError, StoreError, GPTError)
