"""The page for people at `/`: one file, and headers that let it load nothing and speak to its own endpoint only."""

import base64
import hashlib
import re
from pathlib import Path


def _source(page: str, tag: str) -> str:
    """`'sha256-...'` of the page's one inline script or style (https://www.w3.org/TR/CSP3/#match-element-to-source-list)."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _policy(page: str) -> str:
    directives = (
        "default-src 'none'",
        f"script-src {_source(page, 'script')}",
        f"style-src {_source(page, 'style')}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # The page never turns a string into markup or code; a browser that knows this holds it to that.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return "; ".join(directives)


# Read as text: a browser hashes what it parsed, which has no carriage returns.
_PAGE = Path(__file__).with_name("playground.html").read_text(encoding="utf-8")
PAGE: bytes = _PAGE.encode()
"""The body of `GET /`."""
HEADERS: dict[str, str] = {
    "content-type": "text/html; charset=utf-8",
    "content-security-policy": _policy(_PAGE),
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
"""Its headers."""
