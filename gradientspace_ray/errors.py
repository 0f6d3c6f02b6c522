"""Errors for the person who must act: one line, whatever carried them here."""

BRIEF = (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError)
"""Kinds whose messages say little without the kind's name, such as a missing key."""


def one_line(error: BaseException) -> str:
    """What went wrong, in one line.

    An error that crossed Ray is shown as the one that the worker raised. Text that is a traceback says it at its end,
    any other text at its beginning.
    """
    # Ray's wrappers have the worker's exception as `cause`, where it could be brought over.
    while isinstance(cause := getattr(error, "cause", None), BaseException):
        error = cause
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if hasattr(error, "traceback_str") or "Traceback (most recent call last)" in text:
        return lines[-1]
    return f"{type(error).__name__}: {lines[0]}" if isinstance(error, BRIEF) else lines[0]
