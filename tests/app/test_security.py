"""What keeps strangers out and secrets in: headers, wrong keys, proxies, secrets."""

import hashlib
import hmac
import logging
import re
from base64 import b64encode

import pytest
from asked_service import EGGS
from click.testing import CliRunner
from event_streams import STREAM
from redis_server import RedisServer, free_port

from flask_muset.testing import virtual_clock
from muset.app import create_app
from muset.blueprints.openapi import LOGO_STYLE
from muset.cli import main
from muset.services.keys import KeyService
from muset.settings import SETTINGS, load_settings

URL = "/api/v1/documents"


@pytest.fixture
def database():
    """Which database it is makes no difference here."""
    return "sqlite"


@pytest.fixture
def make(environ, services, end):
    """Makes the service with some variables; gives a client."""
    apps = []

    def make(**variables):
        apps.append(create_app(load_settings(environ | variables)))
        return apps[-1].test_client()

    yield make
    for app in apps:
        end(app)


# --- headers --------------------------------------------------------------------------------------

ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def source_of(text):
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def directives_of(answer):
    parts = answer.headers["Content-Security-Policy"].split("; ")
    return {name: sources for name, _, sources in (part.partition(" ") for part in parts)}


def assert_guarded(answer):
    """Each header is there once, nothing may be framed, and no shared cache keeps anything."""
    for name, value in ALWAYS.items():
        assert answer.headers.getlist(name) == [value], name
    for name in ("Content-Security-Policy", "Cache-Control"):
        assert len(answer.headers.getlist(name)) == 1, name
    directives = directives_of(answer)
    assert directives["default-src"] == "'none'"
    assert directives["frame-ancestors"] == "'none'"
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert "*" not in answer.headers["Content-Security-Policy"]
    assert "Strict-Transport-Security" not in answer.headers
    if not answer.request.path.startswith("/docs/"):
        kept = "private, no-cache" if "ETag" in answer.headers else "no-store"
        assert answer.headers["Cache-Control"] == kept


def test_every_answer_has_the_headers(app, client, member, monkeypatch):
    """Of every kind: data, 304, streams, refusals, pages, files, and the constant 500 too."""
    body = {"title": "Bees", "text": "A bee colony has one queen. The queen lays 2,000 eggs a day."}
    where = client.post(URL, json=body, headers=member).headers["Location"]
    tag = client.get(where, headers=member).headers["ETag"]
    statuses = []
    for path, headers in (
        (URL, member),
        (where, member),
        (where, member | {"If-None-Match": tag}),
        (URL, {}),
        ("/nowhere", {}),
        ("/nowhere", {"Accept": "text/html"}),
        (URL, {"X-Request-Timeout-Ms": "x"}),
        ("/health/ready", {}),
        ("/metrics", {}),
        ("/errors", {"Accept": "text/html"}),
        ("/docs", {}),
        ("/docs/", {}),
        ("/docs/swagger-ui.css", {}),
        ("/docs/nothing.css", {}),
    ):
        with client.get(path, headers=headers) as answer:
            statuses.append(answer.status_code)
            assert_guarded(answer)
    assert statuses == [200, 200, 304, 401, 404, 404, 400, 200, 200, 200, 308, 200, 200, 404]
    with client.post("/api/v1/ask", json=EGGS, headers=member | STREAM) as stream:
        assert stream.mimetype == "text/event-stream"
        assert_guarded(stream)

    def broken(*_args, **_kwargs):
        raise RuntimeError

    monkeypatch.setattr(app.json, "dumps", broken)
    last = client.get(f"{URL}/0", headers=member)
    assert (last.status_code, last.mimetype) == (500, "application/json")
    assert_guarded(last)


def test_the_pages_may_use_what_they_have_and_nothing_else(client):
    """The docs page runs its own files and the one script in it; error pages have their style."""
    page = client.get("/docs/")
    directives = directives_of(page)
    (script,) = re.findall(r"<script>(.*?)</script>", page.text, re.S)
    assert directives["script-src"] == f"'self' {source_of(script)}"
    assert directives["style-src"] == f"'self' {source_of(LOGO_STYLE)}"
    assert directives["connect-src"] == "'self'"
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=", page.text)
    written = []
    for name in re.findall(r'src="/docs/([^"]+)"', page.text):
        with client.get(f"/docs/{name}") as bundle:
            written += re.findall(r'createElement\("style",null,"([^"]*)"', bundle.text)
    assert written == [LOGO_STYLE]
    for other in ("http://evil.example.org", "http://x</script><script>"):
        assert client.get("/docs/", base_url=other).text == page.text
    error = client.get("/nowhere", headers={"Accept": "text/html"})
    (style,) = re.findall(r"<style>(.*?)</style>", error.text, re.S)
    assert directives_of(error)["style-src"] == source_of(style)
    assert "script-src" not in directives_of(error)


# --- keys -----------------------------------------------------------------------------------------


def wrong(number=0):
    return {"Authorization": f"Bearer msk_{'x' * 40}{number:03}"}


def guesses(client, count, path=URL, address="192.0.2.7", **headers):
    """The statuses of so many wrong keys."""
    statuses = []
    for number in range(count):
        with client.get(
            path, headers=wrong(number) | headers, environ_base={"REMOTE_ADDR": address}
        ) as answer:
            statuses.append(answer.status_code)
    return statuses


def test_wrong_keys_are_limited_and_good_ones_are_not(make, member):
    """After so many a minute an address gets 429; good keys from there go on, and time heals."""
    with virtual_clock() as clock:
        client = make(MUSET_WRONG_KEYS_PER_MINUTE="3")
        assert guesses(client, 5) == [401, 401, 401, 429, 429]
        there = {"REMOTE_ADDR": "192.0.2.7"}
        refused = client.get(URL, headers=wrong(), environ_base=there)
        assert refused.json["category"] == "rate_limit"
        assert refused.headers["Retry-After"] == "20"
        assert client.get(URL, headers=member, environ_base=there).status_code == 200
        # Who sends none has guessed nothing.
        assert client.get(URL, environ_base=there).status_code == 401
        assert guesses(client, 1, address="192.0.2.8") == [401]
        clock.advance(20)
        assert guesses(client, 2) == [401, 429]
        assert guesses(client, 1, path="/metrics") == [429]
        counted = client.get("/metrics").text
        assert 'muset_policy_decisions_total{decision="rejected",part="rate_limit",' in counted


def test_an_address_of_ipv6_is_its_network(make):
    """One subscriber has all addresses of a /64."""
    client = make(MUSET_WRONG_KEYS_PER_MINUTE="2", RATE_LIMIT_REQUESTS_PER_MINUTE="60")
    found = [guesses(client, 1, address=f"2001:db8::{n}")[0] for n in range(1, 4)]
    assert found == [401, 401, 429]
    assert guesses(client, 1, address="2001:db8:0:1::1") == [401]


def test_wrong_keys_are_counted_by_all_workers_together(make, tmp_path):
    """Over Redis what one worker has seen counts in the other."""
    server = RedisServer(tmp_path)
    server.start()
    try:
        first, second = (
            make(REDIS_URL=server.url, MUSET_WRONG_KEYS_PER_MINUTE="3") for _ in range(2)
        )
        assert guesses(first, 2) + guesses(second, 2) == [401, 401, 401, 429]
        assert guesses(first, 1) == [429]
    finally:
        server.kill()


def test_keys_are_compared_in_constant_time(services, monkeypatch):
    """Digests are compared by hmac.compare_digest, each one of a prefix, whichever fits."""
    store = services.keys._store
    keys = [f"msk_same-pre{letter * 35}" for letter in "abc"]
    for number, key in enumerate(keys):
        services.keys.install(key, f"u{number}@example.org")
    compared = []

    def compare(one, other):
        compared.append((len(one), len(other)))
        return hmac_compare(one, other)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert KeyService(store).authenticate(keys[0]).is_admin
    assert compared == [(32, 32)] * 3


# --- proxies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hops", "real"), [("0", None), ("1", "198.51.100.9")])
def test_nobody_can_forge_an_address(make, hops, real):
    """Wrong keys with a new X-Forwarded-For each time are still one address's."""
    client = make(MUSET_TRUSTED_PROXIES=hops, MUSET_WRONG_KEYS_PER_MINUTE="3")
    statuses = []
    for number in range(5):
        said = f"203.0.113.{number}"
        # A proxy adds the address that it has seen.
        forwarded = said if real is None else f"{said}, {real}"
        statuses += guesses(client, 1, **{"X-Forwarded-For": forwarded})
    assert statuses == [401, 401, 401, 429, 429]
    if real is not None:
        assert guesses(client, 1, **{"X-Forwarded-For": "203.0.113.1, 198.51.100.10"}) == [401]


def test_each_hop_is_counted_from_the_right(make):
    """With two proxies the last but one is the client; less than two are taken as they come."""
    client = make(MUSET_TRUSTED_PROXIES="2", MUSET_WRONG_KEYS_PER_MINUTE="1")
    for said, status in (
        ("1.1.1.1, 198.51.100.9, 10.0.0.2", 401),
        ("2.2.2.2, 198.51.100.9, 10.0.0.3", 429),
        ("198.51.100.10, 10.0.0.2", 401),
        ("not an address, 10.0.0.2", 401),
    ):
        assert guesses(client, 1, **{"X-Forwarded-For": said}) == [status], said


@pytest.mark.parametrize("hops", ["0", "1"])
def test_nobody_is_this_machine_behind_a_proxy(make, hops):
    """/metrics stays closed to whoever says that he is at 127.0.0.1, however it is said."""
    client = make(MUSET_TRUSTED_PROXIES=hops, METRICS_ALLOW="10.0.0.0/8")
    for said in ("127.0.0.1", "203.0.113.5, 127.0.0.1", "::1", "10.0.0.1, 203.0.113.5"):
        for base in ({"REMOTE_ADDR": "127.0.0.1"}, {"REMOTE_ADDR": "192.0.2.1"}):
            answer = client.get("/metrics", headers={"X-Forwarded-For": said}, environ_base=base)
            assert answer.status_code == 403, (said, base)
    real = client.get("/metrics", headers={"X-Forwarded-For": "203.0.113.5, 10.0.0.1"})
    assert real.status_code == (200 if hops == "1" else 403)


@pytest.mark.parametrize(("hops", "location"), [("0", "http://h/docs/"), ("1", "https://h/docs/")])
def test_the_scheme_is_the_proxys_and_the_host_is_never_taken(make, hops, location):
    """X-Forwarded-Proto counts behind a proxy; X-Forwarded-Host, -Port and -Prefix nowhere."""
    client = make(MUSET_TRUSTED_PROXIES=hops)
    said = {f"X-Forwarded-{name}": "evil.example.org" for name in ("Host", "Prefix", "Port")}
    answer = client.get("/docs", base_url="http://h", headers=said | {"X-Forwarded-Proto": "https"})
    assert answer.headers["Location"] == location


# --- secrets --------------------------------------------------------------------------------------

SECRET = "hunter2-4711-planted"


def secrets(tmp_path, is_in_file):
    """The variables with all secrets, said in one of the two ways."""
    said = {
        "REDIS_URL": f"redis://user:{SECRET}@127.0.0.1:{free_port()}/0",
        "CACHE_REDIS_URL": f"redis://user:{SECRET}@127.0.0.1:{free_port()}/1",
        "MUSET_ADMIN_KEY": f"msk_{SECRET}{'x' * 40}",
        "AI_API_KEY": SECRET,
        "DATABASE_URL": f"postgresql://muset:{SECRET}@127.0.0.1:{free_port()}/muset",
    }
    assert said.keys() == {setting.name for setting in SETTINGS if setting.secret}
    if not is_in_file:
        return said
    found = {}
    for name, value in said.items():
        path = tmp_path / name
        path.write_text(f"{value}\n")
        path.chmod(0o600)
        found[f"{name}_FILE"] = str(path)
    return found


@pytest.mark.parametrize("is_in_file", [True, False])
def test_no_secret_setting_is_shown(tmp_path, is_in_file, end, caplog, capfd):
    """Not by the commands, nor by any answer or log line while all that they are for is away."""
    server = {"AI_BASE_URL": f"http://127.0.0.1:{free_port()}/v1", "AI_MODEL": "m"}
    environ = secrets(tmp_path, is_in_file) | server | {"MUSET_DATA_DIR": str(tmp_path)}
    environ |= {"METRICS_PORT": "0", "REQUEST_TIMEOUT": "1"}
    shown = CliRunner().invoke(main, ["settings"], env=environ).output
    assert "REDIS_URL=redis://********@127.0.0.1" in shown
    failed = CliRunner().invoke(main, ["keys", "list"], env=environ)
    assert failed.exit_code == 1
    settings = load_settings(environ)
    caplog.set_level(logging.DEBUG)
    app = create_app(settings)
    client, told = app.test_client(), [shown, failed.output, repr(app.config)]
    for path in ("/health/ready", "/metrics", URL, "/api/v1/admin/errors", "/api/v1/search?q=a"):
        with client.get(path, headers={"Authorization": f"Bearer {settings.admin_key}"}) as answer:
            told.append(f"{answer.headers}{answer.text}")
    end(app)
    told += [caplog.text, *capfd.readouterr()]
    assert [text for text in told if SECRET in text] == []


def test_files_of_secrets_that_all_can_read_are_named(make, tmp_path, caplog):
    """A warning at start says which, and what to do; the text of the file is nobody's."""
    path = tmp_path / "key"
    path.write_text(SECRET)
    server = {"AI_BASE_URL": "http://127.0.0.1:9/v1", "AI_MODEL": "m", "AI_API_KEY_FILE": str(path)}
    listed = tmp_path / "providers.toml"
    listed.write_text(
        '[[providers]]\nname = "own"\nkind = "openai"\nbase_url = "http://127.0.0.1:9/v1"\n'
        'api_key_file = "key"\nmodels = [{ name = "m" }]\n'
    )
    for mode, is_said in ((0o644, True), (0o640, False), (0o600, False)):
        for variables in (server, {"AI_PROVIDERS": str(listed)}):
            path.chmod(mode)
            caplog.clear()
            make(**variables)
            assert (f"{path} has a" in caplog.text) is is_said
            assert SECRET not in caplog.text
