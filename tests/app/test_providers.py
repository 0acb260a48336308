"""Which providers there are: AI_PROVIDERS, AI_BASE_URL, and the kinds that are installed."""

import re
from decimal import Decimal
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from wire import DONE, Wire, chunk, says

from flask_muset import Resilience
from flask_muset.resilience import Bulkhead, CircuitBreaker, RetryStrategy, Timeout
from muset.ports import Model, ModelQuestion, Retrieval
from muset.providers import config as configuration
from muset.providers.config import ProviderConfig, load_providers
from muset.providers.extractive import ExtractiveProvider
from muset.providers.openai import OpenAIProvider
from muset.settings import SETTINGS, SettingsError, load_settings

ROOT = Path(__file__).parents[2]
MAIN = """
[[providers]]
name = "main"
kind = "openai"
base_url = "https://llm.example.org/v1"
api_key_env = "MAIN_KEY"
models = [{name = "small"}]
"""
KEY = "test-key-4711-very-secret"


@pytest.fixture
def load(tmp_path):
    """Loads the providers of a file with this text."""

    def load(text, **environ):
        path = tmp_path / "providers.toml"
        path.write_text(text, encoding="utf-8")
        return load_providers(load_settings({"AI_PROVIDERS": str(path), **environ}))

    return load


def documented():
    """The complete example of the reference."""
    page = (ROOT / "docs" / "providers.md").read_text(encoding="utf-8")
    return re.search(r"^```toml\n(.*?)^```", page, re.S | re.M)[1]


def test_the_documented_example_is_allowed(load, tmp_path):
    """Every key of the reference is read; prices are the very numbers, not floats near them."""
    (tmp_path / "backup.key").write_text(f"{KEY}\n")
    main, backup, own = load(documented(), MAIN_API_KEY=KEY)
    assert [c.provider.name for c in (main, backup, own)] == ["main", "backup", "own"]
    assert main.provider.models == (
        Model("large-2", Decimal("2.50"), Decimal("10")),
        Model("small-2", Decimal("0.15"), Decimal("0.6")),
    )
    assert main.policy["retry"] == {"max_retries": 2, "initial_delay": 0.5}
    assert type(main.policy["retry"]["initial_delay"]) is float
    assert backup.policy == {}
    assert own.provider.models[0].input_price == 0


def test_the_policies_fit_the_parts_that_they_are_for(load):
    """What is written is what RESILIENCE_POLICIES takes for one policy."""
    from flask import Flask

    (main, *_) = load(documented().replace('api_key_file = "backup.key"', ""), MAIN_API_KEY=KEY)
    resilience, app = Resilience(), Flask("policies")
    policy = resilience.policy(
        "main", RetryStrategy, CircuitBreaker, Bulkhead(limit=9), Timeout(seconds=9.0)
    )
    app.config["RESILIENCE_POLICIES"] = {"main": main.policy}
    resilience.init_app(app)
    options = {part.kind: part.options for part in policy.parts}
    for kind, written in main.policy.items():
        assert written.items() <= options[kind].items()


def test_keys_come_from_the_environment_or_a_file(load, tmp_path):
    """Both ways give what is sent; a relative file stands beside AI_PROVIDERS; none sends none."""
    (tmp_path / "main.key").write_text(f"\n{KEY}\n")
    one = MAIN.replace("https://llm.example.org/v1", "{url}")
    two = one.replace('api_key_env = "MAIN_KEY"', 'api_key_file = "main.key"')
    three = one.replace('api_key_env = "MAIN_KEY"', "")
    with Wire(says(chunk("Old."), DONE)) as wire:
        for text in (one, two, three):
            (main,) = load(text.replace("{url}", wire.base_url), MAIN_KEY=KEY)
            list(main.provider.stream(ModelQuestion("?", Retrieval((), {}), "small")))
        sent = [request.headers.get("authorization") for request in wire.requests]
    assert sent == [f"Bearer {KEY}", f"Bearer {KEY}", None]


def change(old, new):
    assert old in MAIN
    return MAIN.replace(old, new)


MODELS = 'models = [{name = "small"}]'
PRICE = "models = [{name = 'small', input_price = %s}]"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[providers]", ["is no TOML"]),
        ("", ["has no provider", "[[providers]]"]),
        ("providers = 7", ["has no provider"]),
        ("providers = [7]", ["provider 1", "must be a table"]),
        (MAIN + "\n[other]\n", ["'other'", "are not known"]),
        (change('name = "main"', ""), ["provider 1", "name must be", "missing"]),
        (change('name = "main"', 'name = "a b"'), ["name must be", "'a b'"]),
        (
            change('kind = "openai"', ""),
            ["kind must be one of ['extractive', 'openai']", "missing"],
        ),
        (change('"openai"', '"opnai"'), ["kind must be one of ['extractive', 'openai']", "opnai"]),
        (MAIN + MAIN, ["provider 'main'", "name must be another one"]),
        (change("base_url", "base_ulr"), ["base_ulr is not known", "'base_url'"]),
        (change("base_url = ", "#"), ["base_url is missing"]),
        (change("https:", "ftp:"), ["base_url must begin with http:// or https://"]),
        (change('"https://llm.example.org/v1"', "7"), ["base_url must be a text", "got 7"]),
        (change('"MAIN_KEY"', '"OTHER_KEY"'), ["api_key_env", "a variable that is set", "OTHER_"]),
        (change('api_key_env = "MAIN_KEY"', 'api_key_file = "none"'), ["api_key_file", "No such"]),
        (MAIN + 'api_key_file = "main.key"', ["api_key_env or api_key_file, not both"]),
        (change(MODELS, ""), ["models is missing", "list at least one"]),
        (change(MODELS, "models = []"), ["models is missing"]),
        (change(MODELS, 'models = "small"'), ["models must be a list"]),
        (change(MODELS, 'models = ["small"]'), ["models[0] must be a table"]),
        (change(MODELS, "models = [{}]"), ["models[0].name must be", "missing"]),
        (change(MODELS, "models = [{name='a'}, {name='a'}]"), ["of different names", "'a'"]),
        (change(MODELS, "models = [{name='a', prices=1}]"), ["models[0].prices is not known"]),
        (change(MODELS, PRICE % "-1"), ["models[0].input_price must be a number", "got -1"]),
        (change(MODELS, PRICE % "true"), ["input_price must be", "True"]),
        (change(MODELS, PRICE % '"2.5"'), ["input_price must be", "'2.5'"]),
        (change(MODELS, PRICE % "nan"), ["input_price must be"]),
        (change(MODELS, PRICE % "inf"), ["input_price must be"]),
        (change(MODELS, PRICE % "1e9"), ["input_price must be a number from 0 to 1000000"]),
        (change(MODELS, PRICE % "0.0000000001"), ["input_price must be"]),
        (MAIN + "policy = 7", ["policy must be a table"]),
        (MAIN + "policy = {retries = {}}", ["policy.retries is not known", "'retry'"]),
        (MAIN + "policy = {retry = 3}", ["policy.retry must be a table"]),
        (MAIN + "policy = {retry = {tries = 3}}", ["policy.retry.tries is not known"]),
        (MAIN + "policy = {timeout = {seconds = 0}}", ["policy.timeout", "above 0", "got 0"]),
        (MAIN + "policy = {bulkhead = {max_wait = 1}}", ["policy.bulkhead.limit must be set"]),
        (MAIN + "options = {region = 'x'}", ["options ['region'] are not known"]),
        ('[[providers]]\nname = "x"\nkind = "extractive"', ["is named 'extractive'"]),
    ],
)
def test_what_is_wrong_stops_the_start_with_its_cure(load, tmp_path, text, words):
    """The file, the provider, the key, the value and what is expected are named; no secret is."""
    with pytest.raises(SettingsError) as caught:
        load(text, MAIN_KEY=KEY)
    said = str(caught.value)
    assert str(tmp_path / "providers.toml") in said
    assert [word for word in words if word not in said] == [], said
    assert KEY not in said


@pytest.mark.parametrize("key", [f"{KEY} x", f"{KEY}\t", "schlüssel-4711"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_shown(load, tmp_path, key):
    """Of the environment and of a file."""
    (tmp_path / "main.key").write_bytes(key.encode() + b"\nsecond line\n")
    for text in (MAIN, change('api_key_env = "MAIN_KEY"', 'api_key_file = "main.key"')):
        with pytest.raises(SettingsError, match="provider 'main': the API key must be") as caught:
            load(text, MAIN_KEY=key)
        assert key not in str(caught.value)


def test_a_key_at_the_place_of_its_name_is_not_shown(load):
    """Who writes the key itself into the file is told what belongs there, not what is there."""
    for name in ("api_key_env", "api_key_file", "api_key"):
        with pytest.raises(SettingsError, match=name) as caught:
            load(change('api_key_env = "MAIN_KEY"', f'{name} = "sk-abcdefghijklmnopqrst"'))
        assert "sk-abc" not in str(caught.value)


def test_a_missing_file_stops_the_start(tmp_path):
    """AI_PROVIDERS that cannot be read is named; a relative path is refused."""
    path = tmp_path / "none.toml"
    with pytest.raises(SettingsError, match=f"{path} cannot be read"):
        load_providers(load_settings({"AI_PROVIDERS": str(path)}))
    with pytest.raises(SettingsError, match=r"AI_PROVIDERS must be the absolute path"):
        load_settings({"AI_PROVIDERS": "providers.toml"})


# --- one server, none, and both -------------------------------------------------------------------

ONE = {"AI_BASE_URL": "https://llm.example.org/v1", "AI_MODEL": "small", "AI_API_KEY": KEY}


def test_one_server_by_three_variables():
    """AI_BASE_URL, AI_MODEL and, if it wants one, AI_API_KEY make a provider named openai."""
    for environ in (ONE, {**ONE, "AI_API_KEY": ""}):
        (found,) = load_providers(load_settings(environ))
        assert isinstance(found.provider, OpenAIProvider)
        assert (found.provider.name, found.provider.models) == ("openai", (Model("small"),))
        assert found.policy == {}


def test_nothing_set_is_no_provider():
    """The service answers by extraction alone."""
    assert load_providers(load_settings({})) == ()


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({**ONE, "AI_PROVIDERS": "/p.toml"}, "AI_PROVIDERS and AI_BASE_URL, AI_API_KEY, AI_MODEL"),
        ({"AI_BASE_URL": ONE["AI_BASE_URL"]}, "needed together, got AI_BASE_URL alone"),
        ({"AI_API_KEY": KEY}, "needed together, got AI_API_KEY alone"),
        ({**ONE, "AI_BASE_URL": "llm.example.org"}, "AI_BASE_URL must be a URL"),
        ({**ONE, "AI_BASE_URL": "ftp://u:hunter2@h"}, "AI_BASE_URL must be a URL"),
        ({**ONE, "AI_BASE_URL": "https://u:hunter2@h"}, "AI_BASE_URL: base_url must bear no cred"),
        ({**ONE, "AI_API_KEY": f"{KEY} x"}, "AI_BASE_URL: the API key must be"),
        ({"AI_IDLE_TIMEOUT": "0"}, "AI_IDLE_TIMEOUT must be seconds from 0.1"),
    ],
)
def test_variables_that_do_not_go_together(environ, words):
    """Both ways at once, half of one, and what cannot be used stop the start."""
    with pytest.raises(SettingsError) as caught:
        load_providers(load_settings(environ))
    assert words in str(caught.value)
    assert KEY not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", [KEY, "id:secret", "https:secret"])
def test_the_key_is_never_shown(key):
    """Neither `muset settings` nor a repr has it, whatever it looks like."""
    settings = load_settings({**ONE, "AI_API_KEY": key})
    shown = {setting.name: settings.shown(setting) for setting in SETTINGS}
    assert shown["AI_API_KEY"] == "********"
    assert shown["AI_BASE_URL"] == ONE["AI_BASE_URL"]
    assert key not in repr(ProviderConfig("main", api_key=key))
    with_credentials = load_settings({**ONE, "AI_BASE_URL": "https://u:hunter2@h/v1"})
    assert "hunter2" not in [with_credentials.shown(setting) for setting in SETTINGS].__repr__()


def test_the_idle_time_is_handed_on(load):
    """AI_IDLE_TIMEOUT holds for every provider."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configuration._Entry, "make", lambda _, kind, config: seen.append(config))
        load(MAIN, MAIN_KEY=KEY, AI_IDLE_TIMEOUT="3")
        load_providers(load_settings({**ONE, "AI_IDLE_TIMEOUT": "3"}))
    assert [config.idle_timeout_s for config in seen] == [3.0, 3.0]


# --- kinds ----------------------------------------------------------------------------------------


class OwnProvider:
    """A provider as another package may have one."""

    has_markers = False

    def __init__(self, config):
        if "shelf" not in config.options:
            raise ValueError("options.shelf is missing; name one")
        self.name, self.models, self.shelf = config.name, config.models, config.options["shelf"]

    def stream(self, question):
        yield from ()


def installed(monkeypatch, *points):
    real = configuration.entry_points(group="muset.providers")
    more = [EntryPoint(name, value, "muset.providers") for name, value in points]
    monkeypatch.setattr(configuration, "entry_points", lambda group: [*real, *more])


OWN = '[[providers]]\nname = "x"\nkind = "own"\n'


def test_another_packages_kind(load, monkeypatch):
    """An entry point is all that a package needs; its options are its own, numbers as floats."""
    installed(monkeypatch, ("own", f"{__name__}:OwnProvider"))
    (found,) = load(OWN + "options = {shelf = [1.5]}")
    assert isinstance(found.provider, OwnProvider)
    assert found.provider.shelf == [1.5]
    assert type(found.provider.shelf[0]) is float
    with pytest.raises(SettingsError, match=r"provider 'x': options.shelf is missing; name one"):
        load(OWN)


@pytest.mark.parametrize("value", ["no_such_module:make", f"{__name__}:no_such_name"])
def test_a_kind_that_cannot_be_loaded(load, monkeypatch, value):
    """The kind, and what its entry point names, are said."""
    installed(monkeypatch, ("own", value))
    with pytest.raises(SettingsError, match=f"'own' cannot be used.*{re.escape(value)}"):
        load(OWN)


def test_two_packages_with_the_same_kind_are_refused(load, monkeypatch):
    """Which one is meant is not guessed; the same one found twice is one."""
    installed(monkeypatch, ("openai", "muset.providers.openai:from_config"))
    load(MAIN, MAIN_KEY=KEY)
    installed(monkeypatch, ("openai", "other.package:make"))
    with pytest.raises(SettingsError, match=r"'openai' \(muset.providers.* and other.package:make"):
        load(MAIN, MAIN_KEY=KEY)


def test_extractive_may_be_listed(load):
    """It needs its own name and nothing else."""
    (found,) = load('[[providers]]\nname = "extractive"\nkind = "extractive"')
    assert isinstance(found.provider, ExtractiveProvider)
