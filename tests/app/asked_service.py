"""The service with providers of a test, and whoever asks it."""

import sqlite3
from contextlib import closing

from event_streams import STREAM, assert_one_end, events_of

from flask_muset import Resilience
from flask_muset.cache_strategies import cache_manager
from muset import migrations
from muset.app import create_app, make_services
from muset.ports import Role
from muset.providers.config import Configured
from muset.settings import load_settings

BEES = "A bee colony has one queen. The queen lays 2,000 eggs a day. Drones do not sting."
EGGS = {"question": "How many eggs does the queen lay a day?"}


class Service:
    """The app with some providers, its client, and who asks."""

    def __init__(self, folder, providers, *, times=None, policies=None, **environ):
        settings = load_settings(
            {
                "MUSET_DATA_DIR": str(folder),
                "RATE_LIMIT_REQUESTS_PER_MINUTE": "0",
                "METRICS_PORT": "0",
                "MAX_RETRIES": "0",
            }
            | environ
        )
        services = make_services(settings, Resilience())
        services.database.write(migrations.upgrade)
        self.who = self._headers(services, "member@example.org")
        self.other = self._headers(services, "other@example.org")
        services.database.close()
        self.app = create_app(
            settings,
            providers=[Configured(p, (policies or {}).get(p.name, {})) for p in providers],
            times=times,
        )
        self.client = self.app.test_client()
        self.bees = self.put(BEES)

    def _headers(self, services, email):
        return {"Authorization": f"Bearer {services.keys.create(email, Role.MEMBER)}"}

    def put(self, text):
        body = {"title": "Bees", "text": text}
        return self.client.post("/api/v1/documents", json=body, headers=self.who).json["id"]

    def ask(self, headers=None, who=None, **options):
        headers = (who or self.who) | (headers or {})
        return self.client.post("/api/v1/ask", json=EGGS | options, headers=headers)

    def stream(self, **options):
        """The response and its events."""
        with self.ask(headers=STREAM, **options) as response:
            assert response.status_code == 200, response.text
            events = events_of(response.text)
        assert_one_end(events)
        return response, events

    def close(self):
        self.app.extensions["muset"].database.close()

    def ledger(self):
        with self.app.app_context():
            assert cache_manager.flush(timeout=10)
        path = self.app.extensions["muset"].database._url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path)) as connection:
            connection.row_factory = sqlite3.Row
            return [dict(row) for row in connection.execute("SELECT * FROM usage ORDER BY rowid")]

    def metrics(self):
        lines = self.client.get("/metrics").text.splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if line.startswith("muset_ai_"))
