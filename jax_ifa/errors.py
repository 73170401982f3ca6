"""How every error of the library reads: the rule, what was expected, what was given."""

from typing import NoReturn


def fail(rule: str, *, expected: object, got: object, error: type[Exception] = ValueError) -> NoReturn:
    """Raise `error`: ValueError for values and shapes, TypeError for dtypes and things of the wrong kind."""
    raise error(f"{rule}: expected {expected}, got {got}")
