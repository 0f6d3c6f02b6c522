"""Whether an endpoint would answer strangers without a key."""

from urllib.parse import urlsplit

from ray.serve.context import _get_global_client

from gradientspace_ray.serving.keys import Keys, is_loopback

GIVE_KEYS = "set GRADIENTSPACE_API_KEY or keys_file, or say allow_anonymous: true"


class ExposedError(RuntimeError):
    """An endpoint without keys on an address that other machines reach."""


def refuse_exposure(host: str, keys: Keys, allow_anonymous: bool) -> None:
    """Refuse to listen where strangers could ask.

    Raises:
        ExposedError: other machines reach `host`, no key is required, and nobody said that this is meant.
    """
    if not (keys.required or allow_anonymous or is_loopback(host)):
        raise ExposedError(f"anyone who reaches {host} could use this endpoint: {GIVE_KEYS}")


def is_from_here(client: str, host_header: str) -> bool:
    """Whether a request was sent by this machine, to this machine.

    The second half is against a page of any web site: a browser lets it ask a name that was made to point here, as if
    that were its own site (DNS rebinding).

    Args:
        client: address of the peer, or what a proxy on this machine says of it.
        host_header: what the client believes to ask.
    """
    try:
        asked = urlsplit(f"//{host_header}").hostname
    except ValueError:
        asked = None
    return is_loopback(client) and asked is not None and is_loopback(asked)


def listening_host() -> str:
    """The address that Serve's proxies listen on; to be asked within a replica.

    Serve tells it to nobody in public: its status has it, but only the dashboard does.
    """
    client = _get_global_client()
    assert client is not None
    return str(client.http_config.host)
