"""What deploy/ names is there: settings, paths, ports; and the programs take their files."""

import os
import re
import runpy
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import redis
import yaml
from redis_server import executable, free_port

from muset.settings import SETTINGS, load_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
APPS = [name for name, each in COMPOSE["services"].items() if "build" in each]
#: Variables of other people's images.
FOREIGN = re.compile(r"(POSTGRES|GF)_\w+")


def env_example():
    """The variables of env.example, those that are commented out too."""
    lines = (DEPLOY / "env.example").read_text().splitlines()
    return dict(re.findall(r"^(?:# )?([A-Z][A-Z_]+)=(.*)$", "\n".join(lines), re.MULTILINE))


def of_setting(variable):
    """The setting that a variable gives, by itself or as a file."""
    known = {setting.name: setting for setting in SETTINGS}
    if variable in known:
        return known[variable]
    setting = known.get(variable.removesuffix("_FILE"))
    assert setting is not None, f"{variable} is no setting"
    assert setting.secret, f"{variable}: only secrets come from files"
    return setting


def test_every_variable_is_a_setting():
    """Of compose.yaml and env.example; what compose.yaml gives can be read."""
    for name, service in COMPOSE["services"].items():
        for variable in service.get("environment", {}):
            if not (name not in APPS and FOREIGN.fullmatch(variable)):
                of_setting(variable)
    for variable in env_example():
        of_setting(variable)


def test_env_example_can_be_used(tmp_path):
    """All of it is read without a complaint, what is commented out too."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    environ = env_example() | {"AI_API_KEY_FILE": str(secret)}
    found = load_settings(environ)
    assert found.values["REDIS_URL"] == "redis://localhost:6379/0"
    assert found.values["AI_MODEL"] == "small"


def test_compose_gives_each_app_the_same(tmp_path):
    """Its values are read, with the files of its secrets."""
    secrets = {}
    for name in APPS:
        environ = dict(COMPOSE["services"][name]["environment"])
        for variable, value in environ.items():
            if variable.endswith("_FILE"):
                secret = Path(value)
                assert secret.parent == Path("/run/secrets")
                assert secret.name in COMPOSE["services"][name]["secrets"]
                secrets[variable] = secret.name
        assert environ == COMPOSE["services"][APPS[0]]["environment"]
    made = runpy.run_path(str(DEPLOY / "make_secrets.py"))
    made["main"].__globals__["FOLDER"] = tmp_path / "secrets"
    made["main"]()
    before = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    made["main"]()
    assert before == {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert stat.S_IMODE((tmp_path / "secrets").stat().st_mode) == 0o700
    files = {Path(each["file"]).name for each in COMPOSE["secrets"].values()}
    assert files == set(before)
    for variable, name in secrets.items():
        environ[variable] = str(tmp_path / "secrets" / name)
    found = load_settings(environ)
    assert found.values["DATABASE_URL"].startswith("postgresql+psycopg://muset:")
    assert found.values["MUSET_ADMIN_KEY"].startswith("msk_")


def test_every_path_is_there():
    """Folders and files that are mounted, secrets, volumes, the image's context."""
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source, _, _ = volume.partition(":")
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), source
        for secret in service.get("secrets", []):
            assert secret in COMPOSE["secrets"]
        if "build" in service:
            assert (DEPLOY / service["build"] / "Dockerfile").is_file()
        image = service["image"]
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+(\.\d+)?", image), image
    dockerfile = (ROOT / "Dockerfile").read_text()
    # The data folder is a volume of its own on each host.
    data = re.search(r"^VOLUME \$\{PREFIX\}(\S+)$", dockerfile, re.MULTILINE)[1]
    assert all(f"{name}:{data}" in COMPOSE["services"][name]["volumes"] for name in APPS)


def test_every_port_is_the_one_that_listens():
    """Nginx, the apps, the metrics and the stores, by the names of the hosts."""
    (published,) = COMPOSE["services"]["nginx"]["ports"]
    inner = published.rpartition(":")[2]
    assert f"listen {inner} " in (DEPLOY / "nginx" / "listen.conf").read_text()
    defaults = {setting.name: setting.default for setting in SETTINGS}
    servers = re.findall(r"^server (\S+)", (DEPLOY / "nginx" / "servers.conf").read_text(), re.M)
    assert servers == [f"{name}:{defaults['PORT']}" for name in APPS]
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = prometheus["scrape_configs"]
    (targets,) = job["static_configs"]
    assert targets["targets"] == [f"{name}:{defaults['METRICS_PORT']}" for name in APPS]
    exposed = re.search(r"^EXPOSE (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    assert exposed.split() == [str(defaults["PORT"]), str(defaults["METRICS_PORT"])]
    urls = [v for v in COMPOSE["services"]["app1"]["environment"].values() if "://" in v]
    assert urls
    for url in urls:
        assert re.search(r"//([\w-]+):6379/", url)[1] in COMPOSE["services"]
    # Nobody outside reaches a store.
    assert all("ports" not in COMPOSE["services"][name] for name in ("redis", "postgres", *APPS))


def test_every_container_has_few_rights():
    """No capabilities, no way to more, nothing to write to but volumes and memory."""
    for name, service in COMPOSE["services"].items():
        if name == "postgres":  # its image begins as root and changes the owner of its folder
            continue
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_what_a_stop_takes():
    """Who closes a kept connection is nginx; each waits longer for the next than that one takes."""
    gunicorn = (ROOT / "muset" / "gunicorn.conf.py").read_text()
    graceful, keepalive = (
        int(re.search(rf"^{name} = (\d+)$", gunicorn, re.MULTILINE)[1])
        for name in ("graceful_timeout", "keepalive")
    )
    nginx = (DEPLOY / "nginx" / "nginx.conf").read_text()
    (upstream,) = re.findall(
        r"upstream muset \{.*?keepalive_timeout (\d+)s;.*?\n    \}", nginx, re.S
    )
    assert int(upstream) < keepalive < graceful
    for name in APPS:
        assert int(COMPOSE["services"][name]["stop_grace_period"].rstrip("s")) > graceful


@pytest.mark.parametrize("name", ["journal", "cache"])
def test_redis_takes_its_file(name, tmp_path):
    """As it stands there, with a folder and a port of this test."""
    port, file = free_port(), DEPLOY / "redis" / f"{name}.conf"
    command = [executable(), file, "--dir", tmp_path, "--port", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    client = redis.Redis(port=port, retry=redis.retry.Retry(redis.backoff.ConstantBackoff(0.1), 50))
    try:
        names = ("maxmemory-policy", "appendonly")
        found = tuple(client.config_get(each)[each] for each in names)
    finally:
        client.close()
        process.terminate()
        process.wait(10)
    wanted = {"journal": ("noeviction", "yes"), "cache": ("allkeys-lru", "no")}
    assert found == wanted[name]


def test_prometheus_takes_its_files():
    """`promtool check config`, rules and all."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed")
    found = subprocess.run(
        [program, "check", "config", DEPLOY / "prometheus" / "prometheus.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert "rule files found" in found.stdout


def test_nginx_takes_the_example_with_tls(tmp_path):
    """In the place of listen.conf, with a certificate of this test."""
    from nginx_server import Nginx

    program = shutil.which("openssl")
    if program is None:
        pytest.skip("openssl is not installed")
    nginx = Nginx(tmp_path, ["127.0.0.1:8000"])
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-keyout", key, "-out", certificate, "-days", "1", "-subj", "/CN=localhost"],
        check=True, capture_output=True,
    )  # fmt: skip
    text = (nginx.conf / "listen-tls.conf.example").read_text()
    text = text.replace("/run/secrets/tls_certificate", str(certificate))
    text = text.replace("/run/secrets/tls_key", str(key))
    (nginx.conf / "listen.conf").write_text(text)
    found = subprocess.run(nginx.command("-t"), capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert os.fspath(nginx.conf) in found.stderr
