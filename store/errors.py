"""Errors of storage and of stored data that a person can act on: one line each, and an exit code at the entry points."""


class StoreError(Exception):
    """A file, folder or URL that cannot be read or written."""


class Unreachable(StoreError):
    """Storage that gave no answer, or none but "not now", for as long as was waited: later it may."""


class NotFound(StoreError):
    """Nothing is stored under that name."""


class DataError(StoreError):
    """Stored bytes that are damaged, incomplete, of a newer format, or not what they are used as."""
