"""`sd3tune ui`: serve the local page on the folders of photos and runs."""

from __future__ import annotations

import os
import socket
import sys
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sd3tune.errors import ConfigError, RunError
from sd3tune.reporting import result, say

_EXTRA = "sd3tune ui needs FastAPI: pip install 'sd3tune[ui]'"


def run_ui(
    folders: Sequence[Path],
    host: str = "127.0.0.1",
    port: int = 7860,
    password_file: Path | None = None,
    browser: bool = True,
) -> None:
    """Serve the page until Ctrl-C; commands that it started continue. Raises UserError."""
    try:
        import uvicorn

        from sd3tune.ui.app import make_app
    except ImportError as error:
        raise RunError(f"{_EXTRA} ({error.name} is missing)") from None
    from sd3tune.ui.security import Access, is_loopback, read_key
    from sd3tune.ui.workspace import Workspace

    workspace = Workspace.opened_on(folders)
    password = _password(host, password_file)
    hosts = () if is_loopback(host) else (host, socket.gethostname())
    access = Access(read_key(workspace.jobs), password, hosts, str(workspace.root))
    listening = _listen(host, port)
    os.chdir(workspace.root)  # where commands run, and what relative paths in configurations mean
    app = make_app(workspace, access)
    address = f"http://{_in_link(host)}:{listening.getsockname()[1]}/"
    link = address if password is not None else f"{address}?token={access.token}"
    say(f"open      {workspace.root}" + "".join(f", {folder}" for folder in workspace.folders[1:]))
    if not is_loopback(host):
        say("warning: without TLS, others in this network can read along; an ssh tunnel is safer (docs/ui.md)")
    result(f"page      {link}", url=link)
    say("Ctrl-C ends the page; commands that it started go on", aside=True)
    if browser and _has_desktop():
        webbrowser.open(link)
    settings = uvicorn.Config(
        app, log_level="warning", server_header=False, proxy_headers=False, timeout_graceful_shutdown=1, lifespan="on"
    )
    server = uvicorn.Server(settings)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
    say("the page is closed; `sd3tune ui` opens it again", aside=True)


def _password(host: str, file: Path | None) -> str | None:
    """Return the password: from the file, the environment or a prompt; None on the loopback without one.

    It is no option, as every user of a machine can read the options of its processes.
    """
    from sd3tune.ui.jobs import PASSWORD
    from sd3tune.ui.security import is_loopback

    if file is not None:
        try:
            password = file.read_text(encoding="utf-8").strip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--password-file: {file} cannot be read: {error}") from None
        source = f"--password-file: {file}"
    elif PASSWORD in os.environ:
        password, source = os.environ[PASSWORD], PASSWORD
    elif is_loopback(host):
        return None
    elif sys.stdin.isatty():
        import getpass

        password, source = getpass.getpass("password for the page: "), "the password"
    else:
        raise ConfigError(f"--host {host}: needs a password: set {PASSWORD}, or give --password-file")
    if len(password) < 8:
        raise ConfigError(f"{source}: has {len(password)} characters; use 8 or more")
    return password


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # a browser that is faster than the server waits
    except OSError as error:
        listening.close()
        raise RunError(f"--host {host} --port {port}: {error.strerror}; choose another --port") from None
    return listening


def _in_link(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _has_desktop() -> bool:
    """Return whether a browser would open in a window; a terminal's browser would cover the link."""
    shown = sys.platform == "darwin" or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ
    return shown and sys.stdout.isatty()
