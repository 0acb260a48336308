"""The audit of dependencies: the real pip-audit, asking a scripted service."""

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from redis_server import free_port

AUDIT = Path(__file__).parents[1] / "deploy" / "audit.py"
PINNED = "flask==3.1.3\nurllib3==2.8.0\n"


def entry(name, version):
    """A vulnerability in the form of OSV."""
    return {
        "id": f"TEST-{name}",
        "summary": "A test.",
        "aliases": [],
        "affected": [
            {
                "package": {"name": name, "ecosystem": "PyPI"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9"}]}],
                "versions": [version],
            }
        ],
    }


@contextmanager
def osv(*vulnerable):
    """A service that knows of these, each a name and a version; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            which = asked["package"]["name"], asked["version"]
            body = json.dumps({"vulns": [entry(*which)]} if which in vulnerable else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def audit(tmp_path, url, *options):
    """The exit code and what is printed."""
    pinned = tmp_path / "constraints.txt"
    pinned.write_text(PINNED)
    run = subprocess.run(
        [sys.executable, str(AUDIT), "--service", "osv", *options, str(pinned)],
        env={"PIP_AUDIT_OSV_URL": url, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return run.returncode, run.stdout


KNOWN = ("django", "1.11")


def test_a_known_vulnerability_fails_the_audit(tmp_path):
    """It is named with the version that has the cure."""
    with osv(KNOWN, ("urllib3", "2.8.0")) as url:
        code, said = audit(tmp_path, url)
    assert code == 1
    assert "urllib3 2.8.0: TEST-urllib3, fixed in 9" in said
    assert "2 packages audited by osv: 1 known vulnerabilities" in said


def test_what_has_none_passes(tmp_path):
    """And it is said how many packages were looked up."""
    with osv(KNOWN) as url:
        assert audit(tmp_path, url) == (0, "2 packages audited by osv: 0 known vulnerabilities\n")


def test_a_service_that_is_away_is_no_pass(tmp_path):
    """It is said that nothing was audited."""
    code, said = audit(tmp_path, f"http://127.0.0.1:{free_port()}/")
    assert code == 0
    assert said.startswith("osv: ")
    assert said.endswith("\nnot audited: the vulnerability service cannot be reached\n")


def test_a_service_that_knows_nothing_is_no_pass(tmp_path):
    """A mirror without data would find every package well; where an audit is due it is an error."""
    with osv() as url:
        code, said = audit(tmp_path, url, "--required")
    assert code == 1
    assert said.startswith("osv: does not know that django==1.11 is vulnerable\nnot audited")
