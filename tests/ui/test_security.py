"""Who may use the page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from sd3tune.errors import ConfigError, RunError
from sd3tune.ui.app import make_app
from sd3tune.ui.security import Access, read_key
from sd3tune.ui.workspace import Outside, Workspace, plain_name


def browser(access: Access, folder: Path, host: str = "127.0.0.1:7860") -> TestClient:
    app = make_app(Workspace.opened_on([folder]), access)
    return TestClient(app, base_url=f"http://{host}", headers={"accept": "text/html"}, follow_redirects=False)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:7860", "192.168.0.5", "", "localhost.evil"])
def test_a_strangers_host_header_is_refused(host: str, tmp_path: Path) -> None:
    access = Access(b"k" * 32)
    client = browser(access, tmp_path)
    client.cookies.set(access.cookie, access.token)
    assert client.get("/jobs", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1", "[::1]:7860"])
def test_the_loopbacks_names_are_known_at_any_port_as_behind_a_tunnel(host: str, tmp_path: Path) -> None:
    access = Access(b"k" * 32)
    client = browser(access, tmp_path)
    assert client.get("/jobs", headers={"host": host, "cookie": f"{access.cookie}={access.token}"}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site", "origin": "http://localhost:8000"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {},
    ],
)
def test_a_cross_site_post_is_refused_even_with_the_cookie(headers: dict[str, str], tmp_path: Path) -> None:
    access = Access(b"k" * 32)
    client = browser(access, tmp_path)
    client.cookies.set(access.cookie, access.token)
    assert client.post("/api/jobs/stop", json={"id": "x"}, headers=headers).status_code == 403


def test_the_link_gives_the_cookie_and_loses_its_token(tmp_path: Path) -> None:
    access = Access(read_key(tmp_path))
    client = browser(access, tmp_path)
    assert client.get("/jobs").headers["location"] == "/login"
    assert client.get("/jobs?token=wrong").headers["location"] == "/login"
    assert client.get("/api/jobs", headers={"accept": "application/json"}).status_code == 401
    answer = client.get(f"/jobs?token={access.token}")
    assert answer.headers["location"] == "/jobs"
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert "SameSite=strict" in answer.headers["set-cookie"]
    assert client.get("/jobs").status_code == 200
    again = browser(Access(read_key(tmp_path)), tmp_path)  # after a restart
    again.cookies = client.cookies
    assert again.get("/jobs").status_code == 200


def test_with_a_password_the_link_is_no_key(tmp_path: Path) -> None:
    access = Access(b"k" * 32, "correct horse", ("box",))
    client = browser(access, tmp_path, "box:7860")
    same = {"origin": "http://box:7860"}
    assert client.get(f"/jobs?token={access.token}").headers["location"] == "/login"
    assert client.post("/login", data={"password": "wrong"}, headers=same).status_code == 403
    assert client.post("/login", data={"password": "correct horse"}, headers=same).status_code == 303
    assert client.get("/jobs").status_code == 200
    assert access.knows("192.168.0.5:7860")
    assert not access.knows("evil.example")


def test_the_key_is_this_users_alone(tmp_path: Path) -> None:
    read_key(tmp_path / "jobs")
    assert (tmp_path / "jobs" / "key").stat().st_mode & 0o777 == 0o600
    (tmp_path / "key").write_bytes(b"short")
    with pytest.raises(RunError, match="not a key"):
        read_key(tmp_path)


def test_every_answer_has_a_strict_policy(tmp_path: Path) -> None:
    access = Access(b"k" * 32)
    client = browser(access, tmp_path)
    for path in ("/login", "/assets/page.css", "/jobs"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_paths_stay_in_the_opened_folders(tmp_path: Path) -> None:
    opened, secret = tmp_path / "opened", tmp_path / "secret"
    (opened / "photos").mkdir(parents=True)
    secret.mkdir()
    (opened / "link").symlink_to(secret)
    workspace = Workspace.opened_on([opened])
    assert workspace.path("photos") == opened / "photos"
    for text in ("..", "../secret", "photos/../../secret", str(secret), "link", "link/x", "/etc/passwd", "a\0b"):
        with pytest.raises(Outside):
            workspace.path(text)
    for name in ("", "../x", "a/b", ".hidden", "a\\b", "a\nb", "x" * 200):
        with pytest.raises(Outside):
            plain_name(name)
    with pytest.raises(ConfigError, match="no such folder"):
        Workspace.opened_on([tmp_path / "missing"])


def test_the_page_loads_no_torch() -> None:
    """It starts at once, and holds no memory of a GPU that training needs."""
    heavy = "import sys, sd3tune.ui.app; sys.exit(', '.join({'torch', 'diffusers', 'transformers'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""
