"""The lease: one driver at a time works on a run directory."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock
from pydantic import BaseModel

from gradientspace_ray.run import RunDirectory, RunError, is_alive

LEASE, LOCK = "lease.json", "lease.lock"
FRESH_S, RENEWAL_S = 30.0, 10.0
# Object stores cannot create exclusively: drivers that start at once see after this pause whose lease was written last.
SETTLE_S = 1.0


class Holder(BaseModel):
    """Contents of `lease.json`: the driver that holds the run directory."""

    owner: str
    host: str
    pid: int
    renewed_at: float

    def is_at_work(self) -> bool:
        """Whether the lease is fresh, and its process not known to be dead."""
        gone = self.host == socket.gethostname() and not is_alive(self.pid)
        return not gone and time.time() - self.renewed_at < FRESH_S


class Lease:
    """One driver's hold on a run directory, as a context; renewed until it is left.

    Entering it raises RunError when another driver holds the run directory, and its lease is fresh.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run, self._owner = run, uuid.uuid4().hex
        self._ended = threading.Event()
        self._renewal = threading.Thread(target=self._renew, name="run-lease", daemon=True)

    def __enter__(self) -> "Lease":
        with self._alone() if self._run.is_local else nullcontext():
            holder = self._holder()
            if holder and holder.is_at_work():
                raise RunError(
                    f"{self._run.uri} is in use by process {holder.pid} on {holder.host}; "
                    f"wait for it, stop it, or give another --run-dir"
                )
            self._write()
        if not self._run.is_local:
            time.sleep(SETTLE_S)
            self.check()
        self._renewal.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._renewal.join()
        # A lease that cannot be removed goes stale by itself.
        with suppress(RunError, OSError):
            self.check()
            self._run.delete(LEASE)

    def check(self) -> None:
        """Make sure that the run directory is still this driver's.

        Raises:
            RunError: another driver took over, as it may when this one could not renew its lease for long.
        """
        holder = self._holder()
        if holder is None or holder.owner != self._owner:
            raise RunError(f"{self._run.uri}: another driver took over; let it finish, then run again")

    def _renew(self) -> None:
        with suppress(RunError):
            while not self._ended.wait(RENEWAL_S):
                # The lease outlives two renewals that fail: disk or network may be back for the third.
                with suppress(OSError):
                    self.check()
                    self._write()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other drivers from taking the lease meanwhile."""
        lock = Path(self._run.path(LOCK))
        lock.parent.mkdir(parents=True, exist_ok=True)
        # It ends with the process that holds it, however that ends.
        with FileLock(lock):
            yield

    def _holder(self) -> Holder | None:
        """Whose lease is there; None for no lease, and for one that is not readable."""
        with suppress(RunError):
            return self._run.read_model(LEASE, Holder)
        return None

    def _write(self) -> None:
        holder = Holder(owner=self._owner, host=socket.gethostname(), pid=os.getpid(), renewed_at=time.time())
        self._run.write_json(LEASE, holder.model_dump())
