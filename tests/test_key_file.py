import hashlib
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradientspace_ray.serving.key_file import KeyFileError, read_keys
from gradientspace_ray.serving.keys import Key

LONG = "sk-0123456789abcdef"
DIGEST = hashlib.sha256(LONG.encode()).hexdigest()


def digest_of(text):
    return hashlib.sha256(text.encode()).digest()


@pytest.fixture
def read(tmp_path):
    def read(content, **arguments):
        path = tmp_path / "keys.yaml"
        path.write_text(content)
        path.chmod(0o600)
        return read_keys(path, environment={}, **arguments)

    return read


def test_a_file(read):
    keys = read(
        f"""
keys:
  - name: alice
    sha256: {DIGEST.upper()}
    requests_per_minute: 60
    concurrent_requests: 4
  - {{name: bob, key: "sk-of-bob-and-nobody-else"}}
admin:
  - {{name: ops@example.org, key: sk-of-the-operators}}
"""
    )
    assert keys.clients == (
        Key("alice", digest_of(LONG), 60, 4),
        Key("bob", digest_of("sk-of-bob-and-nobody-else"), None, None),
    )
    assert keys.admins == (Key("ops@example.org", digest_of("sk-of-the-operators"), None, None),)
    assert keys.client(f"Bearer {LONG}").name == "alice"
    assert read(json.dumps({"admin": [{"name": "ops", "sha256": DIGEST}]})).required is False


def test_the_environment():
    assert not read_keys(environment={}).required
    assert not read_keys(environment={"GRADIENTSPACE_API_KEY": " "}).required
    one = read_keys(environment={"GRADIENTSPACE_API_KEY": LONG})
    assert one.clients == (Key("GRADIENTSPACE_API_KEY", digest_of(LONG)),)
    admin = read_keys(environment={"GRADIENTSPACE_ADMIN_KEY": LONG})
    assert admin.admins == (Key("GRADIENTSPACE_ADMIN_KEY", digest_of(LONG)),)
    assert read_keys(admin_variable="MINE", environment={"MINE": LONG}).admins[0].name == "MINE"
    several = read_keys(client_variable="MINE", environment={"MINE": f"{LONG} , sk-another-0123456789", "OTHER": "x"})
    assert several.clients == (Key("MINE:1", digest_of(LONG)), Key("MINE:2", digest_of("sk-another-0123456789")))


def test_a_file_and_the_environment_add_up(tmp_path):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [{"name": "alice", "key": "sk-of-alice-0123456789"}]}))
    keys = read_keys(path, environment={"GRADIENTSPACE_API_KEY": LONG})
    assert [key.name for key in keys.clients] == ["GRADIENTSPACE_API_KEY", "alice"]
    with pytest.raises(KeyFileError, match="GRADIENTSPACE_API_KEY and alice have the same key; replace one"):
        read_keys(path, environment={"GRADIENTSPACE_API_KEY": "sk-of-alice-0123456789"})


def test_a_variable_that_is_named_must_be_set():
    with pytest.raises(KeyFileError, match="variable MINE is not set"):
        read_keys(client_variable="MINE", environment={"GRADIENTSPACE_API_KEY": LONG})
    with pytest.raises(KeyFileError, match="variable MINE is not set"):
        read_keys(admin_variable="MINE", environment={"GRADIENTSPACE_ADMIN_KEY": LONG})
    with pytest.raises(
        KeyFileError, match=r"API keys: GRADIENTSPACE_API_KEY and GRADIENTSPACE_ADMIN_KEY have the same"
    ):
        read_keys(environment={"GRADIENTSPACE_API_KEY": LONG, "GRADIENTSPACE_ADMIN_KEY": LONG})
    with pytest.raises(KeyFileError, match=r"MINE:2: a key is printable ASCII"):
        read_keys(client_variable="MINE", environment={"MINE": f"{LONG},,"})


SECRET = "sk-secret-0123456789"
BAD = {
    "keys: [": r"keys.yaml, line 1: no valid YAML or JSON",
    f"keys:\n  - key: *{SECRET}": r"keys.yaml, line 2: no valid YAML",
    f"keys: !{SECRET} x": r"keys.yaml, line 1: no valid YAML",
    "keys: 2026-99-99": r"keys.yaml: no valid YAML",
    "": r"no mapping; write the keys as a list under keys:",
    SECRET: r"no mapping; write the keys",
    "keys: []": r"no key; list at least one under keys:",
    f"keys: {SECRET}": r"keys: input should be a valid list",
    f"keys: [{SECRET}]": r"keys\[0\]: input should be a valid dictionary",
    f"keys: !!set {{{SECRET}}}": r"keys\[0\]: input should be a valid dictionary",
    f"keys: [{{name: a, {SECRET}: 1}}]": r"keys\[0\] \(a\): unknown key; valid: name, sha256, key, requests_per_minute",
    f"keyss: [{{name: a, key: {SECRET}}}]": r"yaml: unknown key keyss; did you mean keys\?",
    f"keys: [{{name: a, key: {SECRET}, request_per_minute: 3}}]": r"\(a\): unknown key request_per_minute; did you",
    f"keys: [{{key: {SECRET}}}]": r"keys\[0\]: name is missing",
    "keys: [{name: a}]": r"keys\[0\] \(a\): give exactly one of key and sha256",
    f"keys: [{{name: a, key: {SECRET}, sha256: {DIGEST}}}]": r"keys\[0\] \(a\): give exactly one of key and sha256",
    f"keys: [{{name: a, sha256: {SECRET}}}]": r"\(a\), sha256: not the 64 hex digits .* sha256sum",
    f"keys: [{{name: a, sha256: {DIGEST}0}}]": r"\(a\), sha256: not the 64 hex digits",
    "keys: [{name: a, key: 1234567890123456}]": r"\(a\), key: input should be a valid string",
    f'keys: [{{name: a, key: "{SECRET} x"}}]': r"\(a\), key: a key is made of printable ASCII",
    f'keys: [{{name: "", key: {SECRET}}}]': r"keys\[0\], name: string should match",
    f'keys: [{{name: "{SECRET}\\n", key: x}}]': r"keys\[0\], name: string should match",
    f"keys: [{{name: a, key: {SECRET}, requests_per_minute: 0}}]": r"\(a\), requests_per_minute: input should be",
    f"admin: [{{name: a, key: {SECRET}, concurrent_requests: x}}]": r"admin\[0\] \(a\), concurrent_requests: inp",
    f"keys: [{{name: a, key: {SECRET}}}, {{name: a, key: x{SECRET}}}]": r"two keys are called a; rename one",
    f"keys: [{{name: a, key: {SECRET}}}]\nadmin: [{{name: b, key: {SECRET}}}]": r"a and b have the same key; replace",
}


@pytest.mark.parametrize("content", BAD)
def test_a_bad_file_names_entry_and_mend_in_one_line_and_no_key(read, content):
    with pytest.raises(KeyFileError, match=BAD[content]) as error:
        read(content)
    text = str(error.value)
    assert "\n" not in text
    assert "keys.yaml" in text
    assert "secret" not in text
    assert error.value.__cause__ is None


def test_a_missing_or_binary_file(tmp_path):
    with pytest.raises(KeyFileError, match=r"none.yaml: No such file or directory; give a YAML or JSON file"):
        read_keys(tmp_path / "none.yaml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KeyFileError, match=r"binary: not a text file"):
        read_keys(tmp_path / "binary")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["name", "key", DIGEST]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["keys", "admin", "name", "key", "sha256", "x"]), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_content_is_read_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    problem = ""
    try:
        keys = read_keys(path, environment={})
        assert keys.clients or keys.admins
    except KeyFileError as error:
        problem = str(error)
    assert len(problem.splitlines()) <= 1


def test_open_files_and_short_keys_are_warned_about(tmp_path, caplog):
    path = tmp_path / "keys.yaml"
    path.write_text("keys: [{name: alice, key: sk-short}, {name: bob, key: sk-long-enough-01}]")
    path.chmod(0o600)
    with caplog.at_level(logging.WARNING):
        read_keys(path, environment={})
    assert caplog.messages == [
        f"{path}, alice: the key has 8 characters and may be guessed; make one with: openssl rand -hex 32"
    ]
    caplog.clear()
    path.chmod(0o640)
    with caplog.at_level(logging.WARNING):
        read_keys(path, environment={"GRADIENTSPACE_API_KEY": "zq#8!"})
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "GRADIENTSPACE_API_KEY", f"{path}", f"{path}, alice",
    ]  # fmt: skip
    assert f"chmod 600 {path}" in caplog.text
    assert "zq#8!" not in caplog.text
    assert "sk-short" not in caplog.text
