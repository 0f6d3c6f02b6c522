import pytest

from gradientspace_ray.errors import one_line


class TaskError(Exception):
    """As Ray's: its text is a traceback, and the worker's error is its cause, if that could be brought over."""

    def __init__(self, cause=None):
        super().__init__("\x1b[36mray::f()\x1b[39m (pid=1)\n  File x, line 1\nOSError: no bucket")
        self.cause, self.traceback_str = cause, str(self)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("x.json is missing; make it"), "x.json is missing; make it"),
        (ValueError("\n first\nsecond"), "first"),
        (RuntimeError(), "RuntimeError"),
        (KeyError("prompt"), "KeyError: 'prompt'"),
        (TaskError(), "OSError: no bucket"),
        (TaskError(ValueError("shard 3 is damaged")), "shard 3 is damaged"),
        (TaskError(TaskError(ValueError("shard 3 is damaged"))), "shard 3 is damaged"),
        (RuntimeError("Traceback (most recent call last):\n  x\nTypeError: no"), "TypeError: no"),
    ],
)
def test_an_error_is_one_line(error, line):
    assert one_line(error) == line


def test_what_caused_an_error_does_not_replace_it():
    error = ValueError("the model cannot be loaded; install it")
    error.__cause__ = OSError("no such file")
    assert one_line(error) == "the model cannot be loaded; install it"
