"""Where calls of model servers may go, and what is never sent there."""

import socket
from contextlib import contextmanager

import pytest
from wire import DONE, Wire, answers, chunk, says

from flask_muset.errors import ExternalServiceError
from muset.ports import Delta, Model, ModelQuestion, Retrieval, Tokens
from muset.providers.config import load_providers
from muset.providers.openai import OpenAIProvider
from muset.settings import SettingsError, load_settings

KEY = "test-key-4711-very-secret"
QUESTION = ModelQuestion("How old are oaks?", Retrieval((), {}), "small")


def provider_at(url, **options):
    return OpenAIProvider("main", url, (Model("small"),), **options)


def refused_by(provider):
    with pytest.raises(ExternalServiceError) as caught:
        list(provider.stream(QUESTION))
    return caught.value


@contextmanager
def names(monkeypatch, found):
    """Stands for the system's resolver; gives the names that were looked up."""
    asked, resolve = [], socket.getaddrinfo

    def getaddrinfo(host, port, *args, **kwargs):
        if host not in found:
            return resolve(host, port, *args, **kwargs)
        asked.append(host)
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, 1, 6, "", (address, port))
            for address in found[host]
        ]

    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", getaddrinfo)
        yield asked


METADATA = (
    "169.254.169.254", "169.254.170.2", "[fd00:ec2::254]", "[::ffff:169.254.169.254]",
    "[fe80::a9fe:a9fe]", "100.100.100.200", "168.63.129.16", "[fd20:ce::254]", "192.0.0.192",
)  # fmt: skip


@pytest.mark.parametrize("host", METADATA)
def test_no_address_of_a_clouds_metadata(host, monkeypatch):
    """Refused at start where it is written, and before anything is sent where a name has it."""
    for scheme in ("http", "https"):
        with pytest.raises(ValueError, match=r"base_url .* metadata.* AI_INSECURE_HOSTS"):
            provider_at(f"{scheme}://{host}/v1")
        with names(monkeypatch, {"llm.example.org": ["127.0.0.1", host.strip("[]")]}):
            error = refused_by(provider_at(f"{scheme}://llm.example.org:9/v1"))
        assert (error.unavailable, error.retryable) == (True, False)
        assert "metadata" in error.message
        assert "AI_INSECURE_HOSTS" in error.message


def test_a_name_is_looked_up_once(monkeypatch):
    """What was looked at is what is connected to: a name cannot change its meaning between."""
    with (
        Wire(says(chunk("Old."), DONE)) as wire,
        names(monkeypatch, {"llm.example.org": ["127.0.0.1"]}) as asked,
    ):
        provider = provider_at(f"http://llm.example.org:{wire.port}/v1")
        assert [type(p) for p in provider.stream(QUESTION)] == [Delta, Tokens]
        assert asked == ["llm.example.org"]
        assert wire.requests[0].headers["host"] == f"llm.example.org:{wire.port}"


def test_a_second_address_is_tried(monkeypatch):
    """Where the first one of a name does not answer."""
    with Wire(says(chunk("Old."), DONE)) as wire:
        found = {"llm.example.org": ["127.0.0.9", "127.0.0.1"]}
        with names(monkeypatch, found):
            provider = provider_at(f"http://llm.example.org:{wire.port}/v1")
            assert len(list(provider.stream(QUESTION))) == 2


def test_no_key_goes_to_a_public_address_in_clear(monkeypatch):
    """Plain http with a key is for this machine and private networks, or where it is allowed."""
    for host in ("8.8.8.8", "[2606:4700::1111]"):
        with pytest.raises(ValueError, match=r"public.*unencrypted; use https://.*AI_INSECURE"):
            provider_at(f"http://{host}/v1", api_key=KEY)
        provider_at(f"http://{host}/v1")
        provider_at(f"https://{host}/v1", api_key=KEY)
        provider_at(f"http://{host}/v1", api_key=KEY, insecure_hosts=(host.strip("[]"),))
    for host in ("127.0.0.1", "10.0.0.5", "192.168.1.2", "[::1]", "[fd12::1]", "100.64.0.1"):
        provider_at(f"http://{host}/v1", api_key=KEY)
    with names(monkeypatch, {"llm.example.org": ["8.8.8.8"]}):
        error = refused_by(provider_at("http://llm.example.org:9/v1", api_key=KEY))
    assert "unencrypted" in error.message
    assert KEY not in error.message


def test_redirects_and_proxies_are_not_used(monkeypatch):
    """A redirect is an error, and the environment's proxy hears nothing of a call."""
    with Wire(answers(500, {})) as proxy, Wire(says(DONE)) as other:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        for status in (301, 302, 307, 308):
            with Wire(answers(status, {}, Location=other.base_url + "/chat/completions")) as wire:
                error = refused_by(provider_at(wire.base_url, api_key=KEY))
                assert "redirects are not followed" in error.message
                assert len(wire.requests) == 1
        assert proxy.requests == other.requests == []


def test_an_operator_may_allow_a_host():
    """AI_INSECURE_HOSTS holds for both ways to name a server; without it the start is refused."""
    environ = {"AI_BASE_URL": "http://8.8.8.8/v1", "AI_MODEL": "m", "AI_API_KEY": KEY}
    with pytest.raises(SettingsError, match=r"AI_BASE_URL: base_url .*8\.8\.8\.8 is public"):
        load_providers(load_settings(environ))
    allowed = load_settings(environ | {"AI_INSECURE_HOSTS": "LLM.example.org, 8.8.8.8"})
    assert len(load_providers(allowed)) == 1
    with pytest.raises(SettingsError, match="AI_INSECURE_HOSTS must be hosts"):
        load_settings({"AI_INSECURE_HOSTS": "http://8.8.8.8"})
