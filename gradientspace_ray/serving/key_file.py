"""Reading an endpoint's API keys: a YAML or JSON file, environment variables, or both.

    keys:
      - name: alice
        sha256: 2bd806c97f0e00af1a1fc3328fa763a9269723c8db8fac4f93af71db186d6e90   # or key: ...
        requests_per_minute: 60
        concurrent_requests: 4
    admin:
      - name: ops
        sha256: ...

No error or warning ever holds a key, nor a text that may be one.
"""

import difflib
import logging
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator

from gradientspace_ray.serving.keys import Key, Keys, sha256_of

API_KEY_ENV = "GRADIENTSPACE_API_KEY"
ADMIN_KEY_ENV = "GRADIENTSPACE_ADMIN_KEY"
SHORTEST_KEY = 16
NAME = r"[A-Za-z0-9_.:@-]{1,64}"
Positive = Annotated[int, Field(ge=1, strict=True)]
logger = logging.getLogger(__name__)


class KeyFileError(ValueError):
    """Keys that cannot be used; the message names the place and the mend in one line."""


class KeyEntry(BaseModel):
    """One key in the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True)
    name: Annotated[str, Field(pattern=rf"^{NAME}$")]
    sha256: str | None = None
    """Hex digest of the key, as `printf %s KEY | sha256sum` prints it; or else `key`."""
    key: SecretStr | None = None
    requests_per_minute: Positive | None = None
    """Null is any number."""
    concurrent_requests: Positive | None = None
    """Null is any number."""

    @field_validator("sha256")
    @classmethod
    def _check_digest(cls, digest: str | None) -> str | None:
        if digest is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", digest):
            raise ValueError("not the 64 hex digits of a SHA-256; make them with: printf %s KEY | sha256sum")
        return digest

    @field_validator("key")
    @classmethod
    def _check_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None and not _can_be_sent(key.get_secret_value()):
            raise ValueError("a key is made of printable ASCII characters without spaces")
        return key

    @model_validator(mode="after")
    def _check_one(self) -> "KeyEntry":
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give exactly one of key and sha256")
        return self

    def as_key(self) -> Key:
        """The entry without its plain text."""
        digest = sha256_of(self.key.get_secret_value()) if self.key else bytes.fromhex(self.sha256 or "")
        return Key(self.name, digest, self.requests_per_minute, self.concurrent_requests)


class KeyFile(BaseModel):
    """The file."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
    keys: list[KeyEntry] = []
    admin: list[KeyEntry] = []


def read_keys(
    file: str | Path | None = None,
    client_variable: str | None = None,
    admin_variable: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Keys:
    """The keys of an endpoint; without any of a client, it asks for none.

    Args:
        file: YAML or JSON; None is no file.
        client_variable: environment variable with one key of clients or several, separated by commas; it must be set.
            None takes GRADIENTSPACE_API_KEY if it is set.
        admin_variable: the same for the admin routes, and GRADIENTSPACE_ADMIN_KEY.
        environment: where variables are.

    Raises:
        KeyFileError: a key cannot be used, a key or its name is there twice, or the file lists no key.
    """
    clients = _from_environment(client_variable, API_KEY_ENV, environment)
    admins = _from_environment(admin_variable, ADMIN_KEY_ENV, environment)
    if file is not None:
        listed = _read_file(Path(file))
        clients += [entry.as_key() for entry in listed.keys]
        admins += [entry.as_key() for entry in listed.admin]
    _refuse_duplicates([*clients, *admins], "API keys" if file is None else str(file))
    return Keys(tuple(clients), tuple(admins))


def _from_environment(named: str | None, usual: str, environment: Mapping[str, str]) -> list[Key]:
    variable = named or usual
    value = environment.get(variable, "")
    if not value.strip():
        if named is not None:
            raise KeyFileError(f"the environment variable {variable} is not set; put the API key there")
        return []
    texts = [text.strip() for text in value.split(",")]
    keys = []
    for number, text in enumerate(texts, start=1):
        name = variable if len(texts) == 1 else f"{variable}:{number}"
        if not _can_be_sent(text):
            raise KeyFileError(f"{name}: a key is printable ASCII without spaces; put commas between keys")
        _warn_if_short(text, name)
        keys.append(Key(name, sha256_of(text)))
    return keys


def _read_file(path: Path) -> KeyFile:
    try:
        text = path.read_text(encoding="utf-8")
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            logger.warning("%s: other users of this machine can open the keys; mend: chmod 600 %s", path, path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise KeyFileError(f"{path}: {reason}; give a YAML or JSON file with keys") from None
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        # The parser's own text quotes the file.
        mark = getattr(error, "problem_mark", None)
        place = f"{path}, line {mark.line + 1}" if mark else f"{path}"
        raise KeyFileError(f"{place}: no valid YAML or JSON") from None
    if not isinstance(content, dict):
        raise KeyFileError(f"{path}: no mapping; write the keys as a list under keys:")
    try:
        listed = KeyFile.model_validate(content)
    except ValidationError as error:
        raise KeyFileError(f"{path}: {_explain(error, content)}") from None
    if not listed.keys and not listed.admin:
        raise KeyFileError(f"{path}: no key; list at least one under keys:, with a name and its sha256")
    for entry in (*listed.keys, *listed.admin):
        if entry.key is not None:
            _warn_if_short(entry.key.get_secret_value(), f"{path}, {entry.name}")
    return listed


def _explain(error: ValidationError, content: dict[str, Any]) -> str:
    """All problems in one line, each with its entry."""
    problems = []
    for detail in error.errors(include_input=False, include_url=False):
        location = detail["loc"]
        if detail["type"] == "extra_forbidden":
            *above, unknown = location
            valid = list((KeyEntry if above else KeyFile).model_fields)
            near = difflib.get_close_matches(str(unknown), valid, n=1, cutoff=0.6)
            # What resembles no key of the format may be an API key in the wrong place.
            what = (
                f"unknown key {unknown}; did you mean {near[0]}?" if near else f"unknown key; valid: {', '.join(valid)}"
            )
            problems.append(f"{_place(tuple(above), content)}{what}")
        elif detail["type"] == "missing":
            problems.append(f"{_place(location[:-1], content)}{location[-1]} is missing")
        else:
            cause = detail.get("ctx", {}).get("error", detail["msg"][:1].lower() + detail["msg"][1:])
            problems.append(f"{_place(location, content)}{cause}")
    return "; ".join(dict.fromkeys(problems))


def _place(location: tuple[int | str, ...], content: dict[str, Any]) -> str:
    """`keys[0] (alice), sha256: `; nothing for the whole file."""
    if not location:
        return ""
    section, *rest = location
    place = str(section)
    if rest:
        index, *fields = rest
        place = ", ".join([f"{place}[{index}]{_called(content[str(section)], index)}", *map(str, fields)])
    return f"{place}: "


def _called(entries: Any, index: int | str) -> str:
    """The name of an entry that may have any other fault, to find it by."""
    entry = entries[index] if isinstance(entries, list) and isinstance(index, int) else None
    name = entry.get("name") if isinstance(entry, dict) else None
    return f" ({name})" if isinstance(name, str) and re.fullmatch(NAME, name) else ""


def _refuse_duplicates(keys: Sequence[Key], place: str) -> None:
    by_name: dict[str, Key] = {}
    by_digest: dict[bytes, Key] = {}
    for key in keys:
        if key.name in by_name:
            raise KeyFileError(f"{place}: two keys are called {key.name}; rename one")
        if key.sha256 in by_digest:
            raise KeyFileError(f"{place}: {by_digest[key.sha256].name} and {key.name} have the same key; replace one")
        by_name[key.name] = by_digest[key.sha256] = key


def _can_be_sent(key: str) -> bool:
    """Whether a header takes the key as it is."""
    return re.fullmatch(r"[\x21-\x7e]+", key) is not None


def _warn_if_short(key: str, place: str) -> None:
    if len(key) < SHORTEST_KEY:
        message = "%s: the key has %d characters and may be guessed; make one with: openssl rand -hex 32"
        logger.warning(message, place, len(key))
