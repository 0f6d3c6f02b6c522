"""The other end of `gradientspace release`: asks a running endpoint to change its releases, and shows what it says."""

import math
import os
from datetime import datetime
from typing import Any

import httpx
from pydantic import ValidationError
from rich.markup import escape
from rich.table import Table

from gradientspace_ray.releases import Release, Releases

ADMIN_KEY_ENV = "GRADIENTSPACE_ADMIN_KEY"
# Publishing copies files, perhaps between object stores.
ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S = 900.0, 10.0


class EndpointError(RuntimeError):
    """The endpoint cannot be asked, or refuses; the message is one line."""


def parse_share(text: str) -> float:
    """A canary's share, out of `10%` or `0.1`.

    Raises:
        EndpointError: it is no share above 0 and at most 1, or may be read as either.
    """
    number = text.strip()
    percent = number.endswith("%")
    try:
        share = float(number.removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise EndpointError(f"--canary {text}: give a share such as 10% or 0.1, above 0 and at most 100%")
    if number == "1":
        raise EndpointError("--canary 1: give 1% or 100%")
    return share


def request_of(
    run_dir: str | None, canary: str | None, promote: bool, rollback: bool, status: bool
) -> tuple[str, str, dict[str, Any] | None]:
    """Method, path and body of the one request that the command's options ask for.

    Raises:
        EndpointError: they ask for none, or for several.
    """
    chosen = {"RUN_DIR": run_dir is not None, "--promote": promote, "--rollback": rollback, "--status": status}
    given = [name for name, is_given in chosen.items() if is_given]
    if len(given) != 1:
        found = f", not {' and '.join(given)}" if given else ""
        raise EndpointError(f"give one of {', '.join(chosen)}{found}")
    if canary is not None and run_dir is None:
        raise EndpointError(f"--canary goes with a RUN_DIR, not with {given[0]}")
    if run_dir is not None:
        share = None if canary is None else parse_share(canary)
        # The endpoint has another working directory. A store may be one that only the endpoint can reach.
        place = run_dir if "://" in run_dir else os.path.abspath(os.path.expanduser(run_dir))
        return "POST", "/admin/releases", {"run_dir": place, "canary_share": share}
    if status:
        return "GET", "/admin/releases", None
    return "POST", "/admin/promote" if promote else "/admin/rollback", None


def ask(endpoint: str, method: str, path: str, body: dict[str, Any] | None) -> Releases:
    """Send one admin request, with the key in `GRADIENTSPACE_ADMIN_KEY`. Returns the endpoint's releases.

    Raises:
        EndpointError: nothing answers, what answers is no endpoint of this kind, or it refuses.
    """
    base = endpoint.rstrip("/").removesuffix("/v1")
    key = os.environ.get(ADMIN_KEY_ENV, "")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    timeout = httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    try:
        answer = httpx.request(method, base + path, json=body, headers=headers, timeout=timeout)
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise EndpointError(f"--endpoint {endpoint}: give an address such as http://127.0.0.1:8000") from error
    except UnicodeEncodeError as error:
        raise EndpointError(f"{ADMIN_KEY_ENV} holds characters that no key has") from error
    except httpx.ReadTimeout as error:
        mend = "see with --status what became of it"
        raise EndpointError(f"{base} has not answered for {ANSWER_TIMEOUT_S:.0f} s; {mend}") from error
    except httpx.TransportError as error:
        raise EndpointError(f"{base} does not answer ({error}); is the endpoint running there?") from error
    if answer.is_success:
        try:
            return Releases.model_validate_json(answer.content)
        except ValidationError as error:
            raise EndpointError(f"{base} does not answer as a gradientspace endpoint of this version does") from error
    raise EndpointError(_refusal(base, answer, bool(key)))


def _refusal(base: str, answer: httpx.Response, has_key: bool) -> str:
    message = _message(answer)
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        mend = f"the key in {ADMIN_KEY_ENV} is another one" if has_key else f"set {ADMIN_KEY_ENV} to its admin key"
        return f"{base} asks for its admin key; {mend}"
    if message is None:
        found = f"status {answer.status_code}, {answer.reason_phrase}"
        return f"{base} is no gradientspace endpoint ({found}); give another --endpoint"
    if answer.status_code == httpx.codes.NOT_FOUND:
        return f"{base} is no gradientspace endpoint that takes releases ({message}); give another --endpoint"
    return f"{base} refused: {message}"


def _message(answer: httpx.Response) -> str | None:
    """The message of an error in OpenAI's shape."""
    try:
        return str(answer.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return None


def table_of(state: Releases) -> Table:
    """Who answers what share of the conversations."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("release")
    table.add_column("role")
    table.add_column("run", overflow="fold")
    table.add_column("experts", justify="right")
    table.add_column("traffic", justify="right")
    table.add_column("published")
    rows = [("current", state.current, 1 - state.canary_share), ("canary", state.canary, state.canary_share)]
    for role, release, share in [*rows, ("previous", state.previous, 0.0)]:
        if release is not None:
            experts, traffic = str(len(release.registry.experts)), f"{100 * share:.6g}%"
            table.add_row(release.id, role, escape(release.run_uri), experts, traffic, _since(release))
    return table


def _since(release: Release) -> str:
    if release.published_at is None:
        return "at the endpoint's start"
    return datetime.fromtimestamp(release.published_at).astimezone().isoformat(" ", "seconds")
