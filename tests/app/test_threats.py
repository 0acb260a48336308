"""The threats of docs/security.md: those of what clients send, and the tests that it names."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
URL = "/api/v1/documents"
INJECTIONS = ("'; DROP TABLE users; --", "' OR '1'='1", '") UNION SELECT digest FROM keys --', "%")


def test_sql_in_a_text_is_a_text(client, admin, services):
    """Names, titles, texts, questions, queries and cursors with SQL in them are kept or refused."""
    known = services.keys.list()
    for number, text in enumerate(INJECTIONS):
        user = {"email": f"u{number}@example.org", "name": text}
        assert client.post("/api/v1/users", json=user, headers=admin).json["name"] == text
        document = {"title": text, "text": f"Bees {number} {text}"}
        made = client.post(URL, json=document, headers=admin)
        read = client.get(made.headers["Location"], headers=admin).json
        assert (read["title"], read["text"]) == (text, document["text"])
        for path in ("/api/v1/search", URL, "/api/v1/usage", "/api/v1/users"):
            for name in ("q", "cursor", "limit", "group_by"):
                answer = client.get(path, query_string={name: text}, headers=admin)
                assert answer.status_code in (200, 422), answer.text
        assert client.post("/api/v1/ask", json={"question": text}, headers=admin).status_code == 200
        assert client.get(URL, headers={"Authorization": f"Bearer {text}"}).status_code == 401
    assert services.keys.list() == known


@pytest.mark.parametrize("end_of_line", ["\r\n", "\n", "\r"])
def test_no_header_can_be_put_in(client, admin, end_of_line):
    """Whatever a client sends, and wherever, no header of an answer begins or ends with it."""
    planted = f"planted{end_of_line}X-Evil: 1"
    user = {"email": "evil@example.org", "name": planted}
    for answer in (
        client.get(f"/{planted}"),
        client.get(URL, query_string={"cursor": planted, planted: "1"}, headers=admin),
        client.get(URL, environ_overrides={"HTTP_X_REQUEST_ID": planted}),
        client.get(URL, environ_overrides={"HTTP_TRACEPARENT": planted}),
        client.get(URL, environ_overrides={"HTTP_HOST": planted}),
        client.get("/docs", environ_overrides={"HTTP_HOST": planted}),
        client.post(URL, json={"title": planted, "text": "a"}, headers=admin),
        client.post("/api/v1/users", json=user, headers=admin),
    ):
        assert answer.status_code < 500
        assert "X-Evil" not in answer.headers
        assert "planted" not in str(answer.headers)


def exists(path, name):
    return f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_each_test_of_the_page_exists():
    """What docs/security.md names as shown by a test is, and each threat is shown by one."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    missing = []
    for row in rows:
        named = re.findall(r"`([^`]+)`", row.rsplit(" | ", 1)[1])
        assert named, row
        missing += [test for test in named if "::" in test and not exists(*test.split("::"))]
    assert missing == []
