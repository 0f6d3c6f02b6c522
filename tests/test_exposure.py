"""Who may use an endpoint without keys."""

import pytest

from gradientspace_ray.serving.exposure import ExposedError, is_from_here, refuse_exposure
from gradientspace_ray.serving.keys import Key, Keys, sha256_of

WITH_KEYS = Keys(clients=(Key("alice", sha256_of("sk-alice")),))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "my-host"])
def test_a_public_address_needs_keys_or_a_word(host):
    with pytest.raises(ExposedError, match=f"^anyone who reaches {host} could use this endpoint: set GRADIENT"):
        refuse_exposure(host, Keys(), allow_anonymous=False)
    refuse_exposure(host, Keys(), allow_anonymous=True)
    refuse_exposure(host, WITH_KEYS, allow_anonymous=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_machine_s_own_address_needs_none(host):
    refuse_exposure(host, Keys(), allow_anonymous=False)


@pytest.mark.parametrize(
    ("client", "asked", "from_here"),
    [
        ("127.0.0.1", "127.0.0.1:8000", True),
        ("127.0.0.1", "localhost", True),
        ("::1", "[::1]:8000", True),
        ("127.0.0.1", "LOCALHOST:80", True),
        ("192.168.0.7", "127.0.0.1", False),
        ("", "127.0.0.1", False),
        ("127.0.0.1", "example.org", False),
        ("127.0.0.1", "localhost.example.org", False),
        ("127.0.0.1", "user@example.org", False),
        ("127.0.0.1", "127.0.0.1@example.org", False),
        ("127.0.0.1", "example.org#127.0.0.1", False),
        ("127.0.0.1", "[::1", False),
        ("127.0.0.1", "", False),
    ],
)
def test_a_request_is_from_here_if_both_ends_are(client, asked, from_here):
    assert is_from_here(client, asked) == from_here
