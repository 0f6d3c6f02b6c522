"""Who may ask an endpoint, and how often: API keys, their limits, and the requests inside one ingress replica.

A key is known by its SHA-256 digest alone, so that neither Serve's state nor a log holds what a client sends. Nothing
here speaks HTTP: the ingress turns `UnauthorisedError` and `TooManyError` into answers.
"""

import hashlib
import hmac
import ipaddress
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal
from weakref import WeakSet

WINDOW_S = 60.0
# Before a request of the replica has ended, and at least.
SHORTEST_RETRY_S = 1.0
# Weight of the request that ends in the running mean of how long requests take.
LATEST_SHARE = 0.1
Limit = Literal["rate", "concurrency", "overload"]


class UnauthorisedError(Exception):
    """No valid key came with the request; the message says what to send."""


class TooManyError(Exception):
    """A limit is reached; asking again after `retry_after_s` seconds may succeed."""

    def __init__(self, limit: Limit, retry_after_s: float, message: str) -> None:
        """Describe the refusal.

        Args:
            limit: `rate` (requests a minute of the key), `concurrency` (requests of the key at once) or `overload`
                (requests of everybody at once).
            retry_after_s: seconds, above 0.
            message: for people; one line.
        """
        super().__init__(message)
        self.limit = limit
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Key:
    """One key, and what its owner may do."""

    name: str
    """For logs and errors."""
    sha256: bytes
    """32 bytes."""
    requests_per_minute: int | None = None
    """None is any number."""
    concurrent_requests: int | None = None


@dataclass(frozen=True)
class Keys:
    """The keys of an endpoint: a plain value, safe to pickle into Serve's state."""

    clients: tuple[Key, ...] = ()
    """Keys of /v1."""
    admins: tuple[Key, ...] = ()
    """Keys of the admin routes, and of nothing else."""

    @property
    def required(self) -> bool:
        """Whether clients need a key; if not, anyone may ask."""
        return bool(self.clients)

    def client(self, authorization: str | None) -> Key | None:
        """Whose request this is; None where no key is required.

        Args:
            authorization: the header of that name.

        Raises:
            UnauthorisedError: a key is required, and none of the clients' is there.
        """
        return _find(self.clients, authorization) if self.required else None

    def admin(self, authorization: str | None) -> Key:
        """Which admin asks.

        Raises:
            UnauthorisedError: none of the admins' keys is there, or the endpoint has none.
        """
        if not self.admins:
            raise UnauthorisedError("this endpoint has no admin key, so its admin routes are closed")
        return _find(self.admins, authorization)


def sha256_of(key: str) -> bytes:
    """What is kept of a key: 32 bytes."""
    return hashlib.sha256(key.encode()).digest()


def _find(keys: tuple[Key, ...], authorization: str | None) -> Key:
    """The key in a header `Bearer KEY` (RFC 6750, section 2.1), in a time that does not depend on which one it is."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise UnauthorisedError("no API key; send the header Authorization: Bearer KEY")
    asked, found = sha256_of(token), None
    for key in keys:
        if hmac.compare_digest(key.sha256, asked):
            found = key
    if found is None:
        raise UnauthorisedError("the API key is not valid; send a valid one in the header Authorization: Bearer KEY")
    return found


class Ticket:
    """One request's place inside the replica, until `release`, the end of a `with` block, or the ticket's own end."""

    def __init__(self, release: Callable[["Ticket"], None], key: Key | None, since_s: float) -> None:
        self._release = release
        self.key = key
        self.since_s = since_s
        """The clock when the request came in."""

    def release(self) -> None:
        """Give the place back; more than once does nothing."""
        self._release(self)

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Admission:
    """The requests inside one ingress replica, and the last minute's of each key.

    Limits hold in each replica: an endpoint with two admits up to twice as many. Belongs to one event loop.
    """

    def __init__(self, max_requests: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with nobody inside.

        Args:
            max_requests: requests of all clients at once; None is any number.
            clock: seconds that never go backwards.
        """
        self._max_requests = max_requests
        self._clock = clock
        # Weak: the answer of a client that left before its first byte is never run, only dropped, and its ticket too.
        self._inside: WeakSet[Ticket] = WeakSet()
        self._inside_by_key: defaultdict[str, WeakSet[Ticket]] = defaultdict(WeakSet)
        self._leave_window_s: defaultdict[str, deque[float]] = defaultdict(deque)
        self._mean_request_s = 0.0

    @property
    def requests(self) -> int:
        """How many are inside."""
        return len(self._inside)

    def admit(self, key: Key | None) -> Ticket:
        """Let a request in. One that is refused counts against no limit.

        Args:
            key: whose request it is; None has no limits of its own.

        Raises:
            TooManyError: a limit is reached.
        """
        now_s = self._clock()
        self._check_concurrency(key)
        if key is not None and key.requests_per_minute is not None:
            self._check_rate(key.name, key.requests_per_minute, now_s)
            self._leave_window_s[key.name].append(now_s + WINDOW_S)
        ticket = Ticket(self._release, key, now_s)
        self._inside.add(ticket)
        if key is not None:
            self._inside_by_key[key.name].add(ticket)
        return ticket

    def _check_concurrency(self, key: Key | None) -> None:
        if self._max_requests is not None and len(self._inside) >= self._max_requests:
            message = "the endpoint answers as many requests as it can; try again later"
            raise TooManyError("overload", self._until_one_ends(self._max_requests), message)
        limit = key.concurrent_requests if key is not None else None
        if key is not None and limit is not None and len(self._inside_by_key[key.name]) >= limit:
            message = f"this API key may have {limit} requests at once; wait for one to end"
            raise TooManyError("concurrency", self._until_one_ends(limit), message)

    def _check_rate(self, name: str, limit: int, now_s: float) -> None:
        """Exact over every window of a minute, unlike buckets of tokens or counts per clock minute."""
        leave_s = self._leave_window_s[name]
        while leave_s and leave_s[0] <= now_s:
            leave_s.popleft()
        if len(leave_s) >= limit:
            message = f"this API key may send {limit} requests a minute; wait and try again"
            raise TooManyError("rate", leave_s[0] - now_s, message)

    def _until_one_ends(self, inside: int) -> float:
        """Seconds until the first of so many equally spread requests is expected to end."""
        return max(SHORTEST_RETRY_S, self._mean_request_s / inside)

    def _release(self, ticket: Ticket) -> None:
        if ticket not in self._inside:
            return
        self._inside.discard(ticket)
        if ticket.key is not None:
            self._inside_by_key[ticket.key.name].discard(ticket)
        self._mean_request_s += LATEST_SHARE * (self._clock() - ticket.since_s - self._mean_request_s)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`. Names other than `localhost` count as public."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback
