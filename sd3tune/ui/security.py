"""Who may use the page: an ASGI layer before all pages, which refuses strangers and other sites.

- The Host header must name this machine, or a site that rebinds its own name to 127.0.0.1 could read the page.
- Other sites cannot post: their Origin and Sec-Fetch-Site differ, and the cookie is SameSite.
- Each request carries a cookie. Other users of the machine reach the port as well, but cannot read the key's file. The
  link in the terminal, or the password, gives the cookie. It depends on the key and the password alone, so that an
  open page works after a restart.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import secrets
import threading
import time
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sd3tune.errors import RunError

LOGIN = "/login"
OPEN_TO_ALL = (LOGIN, "/assets/page.css")
"""Paths that need no cookie."""
TOKEN = "token"
_KEY_BYTES = 32
_SAFE_METHODS = ("GET", "HEAD")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_POLICY = "; ".join(
    [
        "default-src 'none'",
        *(f"{kind} 'self'" for kind in ("script-src", "style-src", "connect-src", "form-action", "font-src")),
        "img-src 'self' blob: data:",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine alone."""
    return host in _LOOPBACK


@dataclass(frozen=True)
class Access:
    """What gives access: the key in the jobs' folder and, if there is one, the password."""

    key: bytes
    password: str | None = None
    hosts: tuple[str, ...] = ()
    """Names of this machine that a Host header may have, besides the loopback's."""
    folder: str = ""
    _guess: threading.Lock = field(default_factory=threading.Lock, compare=False)

    @property
    def token(self) -> str:
        """The value of the cookie; without a password, also the token in the link."""
        return hmac.new(self.key, f"sd3tune ui {self.password or ''}".encode(), hashlib.sha256).hexdigest()

    @property
    def cookie(self) -> str:
        """Its name differs by folder, as cookies are shared by all ports of a host."""
        return f"sd3tune_{hashlib.sha256(self.folder.encode()).hexdigest()[:8]}"

    def knows(self, host: str) -> bool:
        """Return whether a Host header names this machine. With `hosts`, any address does; it cannot be rebound."""
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        if name in _LOOPBACK or name in self.hosts:
            return True
        return bool(self.hosts) and _is_address(name)

    def admits(self, request: Request) -> bool:
        try:
            sent = SimpleCookie(request.headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return sent is not None and hmac.compare_digest(sent.value.encode(), self.token.encode())

    def accepts(self, token: str, password: str) -> bool:
        """Return whether a link's token or a password is right; guesses of the password wait for one another."""
        if self.password is None:
            return hmac.compare_digest(token.encode(), self.token.encode())
        with self._guess:
            right = hmac.compare_digest(password.encode(), self.password.encode())
            if not right:
                time.sleep(1)
        return right


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def read_key(folder: Path) -> bytes:
    """Return the key in a folder, which only this user can read; write it at first. Raises RunError."""
    file = folder / "key"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(descriptor, "wb") as new:
                new.write(secrets.token_bytes(_KEY_BYTES))
        key = file.read_bytes()
    except OSError as error:
        raise RunError(f"{file}: {error.strerror}; open the page on a folder of your own") from None
    if len(key) < _KEY_BYTES:
        raise RunError(f"{file}: not a key of {_KEY_BYTES} bytes; remove it and run again")
    return key


class Guard:
    """The ASGI layer: answers refused requests itself, and adds the security headers to all answers."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there are no web sockets
        request = Request(scope)
        refusal = self._refusal(request)
        await (self.app if refusal is None else refusal)(scope, receive, _with_headers(send))

    def _refusal(self, request: Request) -> ASGIApp | None:
        headers, path = request.headers, request.url.path
        if not self.access.knows(headers.get("host", "")):
            return PlainTextResponse("This page answers to this machine's own name only.\n", 421)
        if request.method not in _SAFE_METHODS and not _is_same_site(headers):
            return PlainTextResponse("Another site may not change anything here.\n", 403)
        if path in OPEN_TO_ALL or self.access.admits(request):
            return None
        token = parse_qs(request.url.query).get(TOKEN, [""])[0]
        if request.method == "GET" and token and self.access.password is None and self.access.accepts(token, ""):
            return admitted(self.access, path)
        if request.method in _SAFE_METHODS and "text/html" in headers.get("accept", ""):
            return RedirectResponse(LOGIN, 303)
        return PlainTextResponse("Open the link that `sd3tune ui` printed, or log in.\n", 401)


def admitted(access: Access, path: str) -> RedirectResponse:
    """Return the answer that sets the cookie and leads to a page, without the token in its address."""
    answer = RedirectResponse(path, 303)
    answer.set_cookie(access.cookie, access.token, max_age=365 * 86400, httponly=True, samesite="strict")
    return answer


def _is_same_site(headers: Headers) -> bool:
    """Return whether a request that changes something comes from this page; at least one header must say so."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None and site != "same-origin":
        return False
    if origin is not None:
        return urlsplit(origin).netloc == headers.get("host")
    return site is not None


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
            headers.setdefault("cache-control", "no-store")
        await send(message)

    return wrapped
