"""Errors of storage and of stored data that a person can act on: one line each, exit code 2 at the entry points."""


class StoreError(Exception):
    """A file, folder or URL that cannot be read or written."""


class NotFound(StoreError):
    """Nothing is stored under that name."""


class DataError(StoreError):
    """Stored bytes that are damaged, incomplete, of a newer format, or not what they are used as."""
