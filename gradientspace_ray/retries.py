"""Requests to an object store, made again when they fail in a way that may pass."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_exponential_jitter

# pyarrow repeats each request to S3 for six seconds by itself: three tries are about 20 s. One that hangs takes a
# hundred seconds, and is not tried again.
TRIES, FIRST_WAIT_S, PATIENCE_S = 3, 1.0, 15.0
# What pyarrow says of an object store's errors that stay as they are; lost connections and the like are the others.
PERMANENT = re.compile(
    r"(AWS Error |Status\()(ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|NO_SUCH_BUCKET|INVALID_|SIGNATURE_|MISSING_"
    r"|UNRECOGNIZED_CLIENT|VALIDATION|\w+_EXPIRED|\w+_SKEWED)|HTTP status (3\d\d|40[0135])"
)
T = TypeVar("T")


def insist(act: Callable[..., T], *args: Any, **options: Any) -> T:
    """What `act` returns; it is done again, as a whole, after an error of the network or of a server.

    Raises:
        OSError: it failed `TRIES` times, or in a way that stays.
    """
    return Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(TRIES) | stop_after_delay(PATIENCE_S),
        wait=wait_exponential_jitter(initial=FIRST_WAIT_S, jitter=FIRST_WAIT_S),
        reraise=True,
    )(act, *args, **options)


def _may_pass(error: BaseException) -> bool:
    # pyarrow gives a number to errors of this machine, and to what is missing, and none to those of a store.
    return type(error) is OSError and error.errno is None and not PERMANENT.search(str(error))
