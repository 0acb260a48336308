"""Settings: typed, checked, documented."""

from pathlib import Path

import pytest

from muset.settings import SETTINGS, Settings, SettingsError, load_settings

GUIDE = {
    "LOG_LEVEL": "INFO", "LOG_FORMAT": "json", "LOG_FILE": "/var/log/muset/app.log",
    "ENABLE_METRICS": True, "METRICS_PORT": 9090, "REQUEST_TIMEOUT": 30.0,
    "MAX_CONCURRENT_REQUESTS": 100, "RATE_LIMIT_REQUESTS_PER_MINUTE": 60,
    "ENABLE_CIRCUIT_BREAKER": True, "CIRCUIT_BREAKER_THRESHOLD": 5, "CIRCUIT_BREAKER_TIMEOUT": 60.0,
    "MAX_RETRIES": 3, "RETRY_INITIAL_DELAY": 1.0, "RETRY_MAX_DELAY": 60.0,
    "REDIS_URL": None, "REDIS_MAX_CONNECTIONS": 10,
}  # fmt: skip


def test_the_sixteen_of_the_guide_have_its_defaults():
    """Names and defaults are the guide's, but for REDIS_URL, which is unset."""
    assert GUIDE.items() <= Settings().values.items()


def test_the_table_in_the_docs_is_the_table_in_the_code():
    """docs/settings.md has the same names and defaults, in the same order."""
    page = (Path(__file__).parents[2] / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    documented = [(row[0].removeprefix("| "), row[1]) for row in rows]
    settings = Settings()
    assert documented == [
        (setting.name, "(unset)" if setting.default is None else settings.shown(setting))
        for setting in SETTINGS
    ]


def test_all_problems_at_once_with_cure_and_without_secrets():
    """Every bad variable is named with what is expected; a secret's value is not shown."""
    with pytest.raises(SettingsError) as caught:
        load_settings(
            {
                "PORT": "0",
                "LOG_LEVEL": "LOUD",
                "REQUEST_TIMEOUT": "nan",
                "ENABLE_METRICS": "maybe",
                "DATABASE_URL": "postgresql://u:hunter2@h:port/d",
                "MUSET_ADMIN_KEY": "hunter2",
            }
        )
    text = str(caught.value)
    assert "PORT must be a whole number from 1 to 65535, got '0'." in text
    for name in ("LOG_LEVEL", "REQUEST_TIMEOUT", "ENABLE_METRICS", "DATABASE_URL", "MUSET_ADMIN"):
        assert name in text
    assert "hunter2" not in text


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///muset.db",
        "sqlite:////tmp/",
        "sqlite://",
        "mysql://h/d",
        "postgres://h/d",
        "postgresql+psycopg2://h/d",
        "postgresql://h",
        "postgresql://h/",
        "postgresql://h:0/d",
        "postgresql://u:a/b@h/d",
    ],
)
def test_a_database_that_cannot_be_meant_is_refused(url):
    """A relative path would be another file in another folder; of the rest a part is missing."""
    with pytest.raises(SettingsError, match=r"DATABASE_URL .* absolute path"):
        load_settings({"DATABASE_URL": url})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:hunter2@h:5/d", "postgresql+psycopg://********@h:5/d"),
        ("postgresql+psycopg:///d?password=hunter2", "postgresql+psycopg:///d?********"),
        ("postgresql://u@h/d", "postgresql+psycopg://********@h/d"),
        ("sqlite:////var/muset.db", "sqlite:////var/muset.db"),
    ],
)
def test_database_urls_and_how_they_are_shown(url, shown):
    """PostgreSQL is reached through psycopg; no password is shown, wherever it stands."""
    settings = load_settings({"DATABASE_URL": url})
    setting = next(s for s in SETTINGS if s.name == "DATABASE_URL")
    assert settings.database_url == url.replace("postgresql://", "postgresql+psycopg://")
    assert settings.shown(setting) == shown


@pytest.mark.parametrize("password", ["hunter2", "hun/ter2", "hun?ter2", "hun#ter2"])
def test_a_password_that_is_not_written_as_it_should_be_is_not_shown(password):
    """Not even a part of it."""
    setting = next(s for s in SETTINGS if s.name == "REDIS_URL")
    shown = load_settings({"REDIS_URL": f"redis://:{password}@h:1/0"}).shown(setting)
    assert "hun" not in shown
    assert "ter2" not in shown


def test_secret_from_a_file(tmp_path):
    """X_FILE gives X; both at once, or a file that cannot be read, stop the start."""
    path = tmp_path / "url"
    path.write_text("redis://:hunter2@host:6379/0\n")
    settings = load_settings({"REDIS_URL_FILE": str(path)})
    setting = next(s for s in SETTINGS if s.name == "REDIS_URL")
    assert settings.values["REDIS_URL"] == "redis://:hunter2@host:6379/0"
    assert settings.sources["REDIS_URL"] == "file"
    assert "hunter2" not in settings.shown(setting)
    for environ in (
        {"REDIS_URL_FILE": str(path), "REDIS_URL": "redis://x"},
        {"REDIS_URL_FILE": str(tmp_path / "none")},
    ):
        with pytest.raises(SettingsError, match="REDIS_URL"):
            load_settings(environ)
