"""The one error a user can cause in this package."""


class GPTError(ValueError):
    """A model or tokenizer that cannot be what was asked for; the message says what was found and what to do."""
