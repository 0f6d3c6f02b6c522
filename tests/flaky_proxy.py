"""A proxy in front of an HTTP server that cuts connections in the middle, or refuses requests, when told to.

    with FlakyProxy(server_url) as proxy:
        proxy.cut("PUT|POST", after=1_000_000, times=2)
        use(proxy.url)
        assert proxy.cuts == 2

It is for plain HTTP/1.1 as pyarrow and boto speak it: one request at a time on a connection.
"""

import os
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Literal
from urllib.parse import urlsplit

PIECE_BYTES = 64 * 1024
# Linger for no time: closing sends a reset, and what was not sent yet is lost.
RESET = struct.pack("ii", 1, 0)


@dataclass
class _Fault:
    requests: re.Pattern[str]
    times: float
    after: int = 0
    of: Literal["request", "answer"] = "request"
    status: int | None = None


@dataclass
class _Pair:
    """A client's connection, and the one to the server for it."""

    client: socket.socket
    server: socket.socket
    cut_answer_after: int | None = None
    """How many more bytes of the answer get through; None for all."""


class FlakyProxy:
    """Passes connections on to the server at `url`, and spoils some of them when told to.

    A context that starts and stops it. What is told first goes first; each connection is spoilt once, as it then ends.
    """

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self._behind, self._server = place.netloc, (place.hostname, place.port)
        self._faults: list[_Fault] = []
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self.url = ""
        """Of the proxy itself, once it is started."""
        self.requests: list[str] = []
        """`METHOD /path?query` of everything that was asked, also of what was spoilt."""
        self.cuts = 0
        """How many requests were cut or refused so far."""

    def __enter__(self) -> "FlakyProxy":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Take connections, at a port of its own."""
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = "http://{}:{}".format(*self._listener.getsockname())
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        """Take no more connections, and end those that are open."""
        with self._lock:
            listener, self._listener = self._listener, None
            left = list(self._open)
        for connection in [listener, *left] if listener else left:
            with suppress(OSError):
                # It wakes the threads that wait there; they close what they opened.
                connection.shutdown(socket.SHUT_RDWR)

    def through(self, uri: str) -> str:
        """A URI that names the server, with this proxy in its place."""
        return uri.replace(self._behind, urlsplit(self.url).netloc)

    def cut(
        self,
        requests: str = "",
        after: int = 0,
        of: Literal["request", "answer"] = "request",
        times: float = 1,
    ) -> None:
        """Cut the next connections that carry matching requests.

        Args:
            requests: a regular expression, searched in `METHOD /path?query`.
            after: how many bytes get through first: of the request's body, or of the whole answer. With none of its
                body a request does not reach the server; a body that has fewer does, whole, and the answer is lost.
            of: in the middle of what to cut: a client that sends sees a reset, one that receives an early end.
            times: how many connections; `math.inf` for all.
        """
        self._add(_Fault(re.compile(requests), times, after, of))

    def refuse(self, status: int, requests: str = "", times: float = 1) -> None:
        """Answer the next matching requests with an error of S3, and do not let the server see them."""
        self._add(_Fault(re.compile(requests), times, status=status))

    def mend(self) -> None:
        """Pass everything on from here."""
        with self._lock:
            self._faults.clear()

    def _add(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def _accept(self, listener: socket.socket) -> None:
        with listener, suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._server)
        except OSError:
            client.close()
            return
        pair = _Pair(client, server)
        for connection in (client, server):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open |= {client, server}
            goes_on = self._listener is not None
        answers = threading.Thread(target=self._pass_answers, args=(pair,), daemon=True)
        answers.start()
        with suppress(OSError), client.makefile("rb") as stream:
            while goes_on:
                goes_on = self._pass_request(pair, stream)
        self._end(pair)

    def _pass_request(self, pair: _Pair, stream: BinaryIO) -> bool:
        """Pass one request on; whether the connection goes on after it."""
        head = _head(stream)
        if not head:
            return False
        method, target = head.split(b" ", 2)[:2]
        fault = self._choose(f"{method.decode()} {target.decode()}")
        if fault and fault.status:
            for _ in _body(head, stream):
                pass
            self._count()
            pair.client.sendall(_refusal(fault.status))
            return False
        cut = fault is not None and fault.of == "request"
        with self._lock:
            # No answer is on its way: a client asks again when it has the answer to what it asked before.
            pair.cut_answer_after = None if fault is None or cut else fault.after
        if not cut:
            pair.server.sendall(head)
            for piece in _body(head, stream):
                pair.server.sendall(piece)
            return True
        left = fault.after
        if left:
            pair.server.sendall(head)
            for piece in _body(head, stream):
                pair.server.sendall(piece[:left])
                left -= len(piece[:left])
                if not left:
                    break
        self._count()
        for connection in (pair.client, pair.server):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        # Closed while nobody else reads from it, so that the client sees a reset and nothing before it.
        os.close(pair.client.detach())
        return False

    def _pass_answers(self, pair: _Pair) -> None:
        with suppress(OSError):
            while piece := pair.server.recv(PIECE_BYTES):
                with self._lock:
                    left = pair.cut_answer_after
                    if left is not None:
                        pair.cut_answer_after = left - len(piece[:left])
                pair.client.sendall(piece if left is None else piece[:left])
                if left is not None and len(piece) >= left:
                    self._count()
                    break
        self._end(pair)

    def _choose(self, request: str) -> _Fault | None:
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.times > 0 and fault.requests.search(request):
                    fault.times -= 1
                    return fault
        return None

    def _count(self) -> None:
        with self._lock:
            self.cuts += 1

    def _end(self, pair: _Pair) -> None:
        for connection in (pair.client, pair.server):
            with self._lock:
                self._open.discard(connection)
            with suppress(OSError):
                # It wakes the thread that waits for the other side.
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def _head(stream: BinaryIO) -> bytes:
    """The lines of a request before its body; empty when the client has closed the connection."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = stream.readline()
        if not line:
            return b""
        head += line
    return head


def _body(head: bytes, stream: BinaryIO) -> Iterator[bytes]:
    """A request's body as it is on the wire."""
    if re.search(rb"(?im)^transfer-encoding:.*chunked", head):
        size = -1
        while size:
            line = stream.readline()
            yield line
            size = int(line.split(b";")[0] or b"0", 16)
            # With the end of its line; the last chunk is empty, and we expect no trailers after it.
            yield stream.read(size + 2)
        return
    length = re.search(rb"(?im)^content-length:\s*(\d+)", head)
    left = int(length[1]) if length else 0
    while left:
        piece = stream.read1(min(left, PIECE_BYTES))
        if not piece:
            raise ConnectionError("the client went away in the middle of a body")
        left -= len(piece)
        yield piece


def _refusal(status: int) -> bytes:
    code = {403: "AccessDenied", 404: "NoSuchBucket", 500: "InternalError", 503: "SlowDown"}[status]
    body = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>as told</Message></Error>'
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n{body}".encode()
