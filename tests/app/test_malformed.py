"""Requests that no client should send: each is refused in the one form, and nothing breaks."""

import collections
import json
import random

import pytest

BODIES = (
    b"", b"{", b"}", b"[", b"nul", b"\xff\xfe{}", b'{"title": "\xff"}', b"\0", b'"', b"{}{}",
    b'{"a": 1,}', b"{'a': 1}", b'{"a": NaN}', b'{"a": 1e999}', b"[" * 100_000, b'{"a":' * 100_000,
    b"[" * 100_000 + b"]" * 100_000, b'{"q": ' + b"9" * 5_000 + b"}", b"1" * 100_000,
    b'{"question": ' * 2_000 + b"1" + b"}" * 2_000, b"\xef\xbb\xbf{}", b"--x\r\n\r\n--x--",
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1.5, 2**31, 2**63, -(2**63) - 1, 10**400, "", " ", "a", "\0",
    "\ud800", "a\0b", "\u202e", "x" * 5_000, "1", "null", "../..", "%", "'; DROP TABLE x; --", [],
    {}, [[]], [None], {"a": {}}, ["a"] * 500, "2026-02-30", "a@b", "٣", 1e-320, "auto", "day",
)  # fmt: skip
FIELDS = (
    "title", "text", "question", "k", "model", "document_ids", "max_tokens", "allow_degraded",
    "email", "name", "role", "mode", "expires_s", "pattern", "action", "q", "limit", "cursor",
    "from", "to", "group_by", "user_id", "__proto__", "", "\0",
)  # fmt: skip
QUERIES = (
    "limit=x", "limit=-1", "limit=1&limit=2", "limit=" + "9" * 3_000, "cursor=-1", "cursor=%00",
    "cursor=" + "1" * 19, "cursor=%F0%28", "cursor=W10", "cursor=eyJhIjoxfQ", "q=%00", "q=%ff%fe",
    "q=" + "%F0%9F%90%9D" * 600, "k=%D9%A3", "k=1.0", "k=0x1", "k=", "from=0000-01-01",
    "from=today", "to=9999-12-31&from=9999-12-31", "group_by=%00", "user_id=1e3", "=&=&&", "%",
    "a[]=1", "?", "\t", "limit", "&" * 3_000,
)  # fmt: skip
TYPES = (
    "application/json", "application/json; charset=utf-16", "application/json; charset=nonsense",
    "text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
    "multipart/form-data; boundary=", "multipart/form-data; boundary=x", "application/xml", "/", "",
    "application/json" + ";" * 1_000, "a" * 2_000, "\xff",
)  # fmt: skip
HEADERS = {
    "HTTP_IF_MATCH": ("garbage", '"', 'W/"', "*, *", '"\xff"', ", " * 500, '"' + "a" * 4_000),
    "HTTP_IF_NONE_MATCH": ("garbage", '"', "W/", '"\xff"', ", " * 500),
    "HTTP_X_REQUEST_ID": ("", " ", "a" * 5_000, "\xff\xfe", "a\tb", '"}'),
    "HTTP_X_REQUEST_TIMEOUT_MS": ("", "-1", "x", "1e9", "9" * 400, "\xb2", "nan"),
    "HTTP_TRACEPARENT": ("x", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "\xff", "-" * 5_000),
    "HTTP_ACCEPT": ("", "nonsense", "text/html;q=x", "*/*;q=9", "," * 2_000, "\xff"),
    "HTTP_RANGE": ("bytes=9-1", "bytes=a-b", "x"),
    "HTTP_IF_MODIFIED_SINCE": ("yesterday", "\xff"),
    "HTTP_HOST": ("", "a b", "x" * 3_000, "[", "\xff"),
    "CONTENT_LENGTH": ("-1", "x", "", "9" * 30),
    "HTTP_COOKIE": ("a", "=;=;", "\xff" * 50),
    "HTTP_X_FORWARDED_FOR": ("x", "," * 500, "\xff"),
}
KEYS = ("", "Bearer", "Bearer ", "Bearer msk_", "Bearer \xff", "Basic eA==", "Basic \xff", "msk_x",
        "Bearer msk_" + "x" * 5_000, "Bearer msk_" + "x" * 43, "Digest a=b", "\0")  # fmt: skip
IDS = ("0", "-1", "1.0", "x", "9" * 400, "1e3", "%00", "%ff", "%2e%2e", "1/", "1;2", "\u0663", " ",
       "99999999999999999999", "*", "a" * 4_000)  # fmt: skip
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get",
           "PROPFIND", "\x7f")  # fmt: skip


def a_body(draw):
    """A text that is no JSON, or JSON of what is not asked for."""
    if draw.random() < 0.3:
        return draw.choice(BODIES)
    fields = draw.sample(FIELDS, draw.randrange(1, 6))
    return json.dumps({field: draw.choice(VALUES) for field in fields}).encode()


def a_request(draw, rules, admin):
    """Arguments of `client.open`: a route that exists, and one or more things wrong with it."""
    rule = draw.choice(rules)
    path = rule.rule
    for argument in rule.arguments:
        value = draw.choice(IDS) if draw.random() < 0.5 else "1"
        for converter in ("int:", "path:", ""):
            path = path.replace(f"<{converter}{argument}>", value)
    environ = {"HTTP_AUTHORIZATION": admin["Authorization"]}
    if draw.random() < 0.1:
        environ["HTTP_AUTHORIZATION"] = draw.choice(KEYS)
    for name in draw.sample(sorted(HEADERS), draw.choice((0, 0, 1, 2))):
        environ[name] = draw.choice(HEADERS[name])
    is_usual = draw.random() < 0.8
    made = {
        "method": draw.choice(sorted(rule.methods)) if is_usual else draw.choice(METHODS),
        "path": path,
        "query_string": draw.choice(QUERIES) if draw.random() < 0.5 else "",
        "environ_overrides": environ,
    }
    if made["method"] not in ("GET", "HEAD") or draw.random() < 0.1:
        made["data"] = a_body(draw)
        made["content_type"] = TYPES[0] if draw.random() < 0.7 else draw.choice(TYPES)
    return made


@pytest.mark.claim(
    "10,000 malformed requests: no 5xx, no traceback, every refusal in the one form of errors"
)
def test_malformed_requests(app, client, admin, prove):
    """Bad JSON, UTF-8, types, numbers, headers, cursors, ids and methods, alone and together."""
    draw, count = random.Random(11), 10_000 if prove.full else 200
    # What an operator may force open answers 503, as it should.
    rules = [r for r in app.url_map.iter_rules() if r.endpoint != "admin.change_policy"]
    statuses, wrong = collections.Counter(), []
    for _ in range(count):
        asked = a_request(draw, rules, admin)
        with client.open(**asked) as answer:
            status, text = answer.status_code, answer.get_data(as_text=True)
        statuses[f"{status // 100}xx"] += 1
        is_wrong = status >= 500 or "Traceback (most recent call last)" in text
        if status >= 400 and asked["method"] != "HEAD":
            is_wrong |= not is_error_body(text, status)
        if is_wrong:
            wrong.append((asked, status, text[:500]))
    prove.figure(f"{count} requests: {dict(statuses)}, {len(wrong)} answered wrongly")
    assert wrong == []
    assert statuses["4xx"] > count / 2


def is_error_body(text, status):
    """Whether it is ErrorHandler's, for people who ask for HTML too."""
    if text.lower().startswith("<!doctype html>"):
        return str(status) in text
    body = json.loads(text)
    return {"error", "message", "category", "request_id"} <= body.keys()


def test_deep_json_is_refused_everywhere(app, client, admin):
    """100,000 brackets are 400 at every route that takes JSON, and stop nobody else."""
    deep = b'{"title": "a", "question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    seen = 0
    for rule in app.url_map.iter_rules():
        for method in rule.methods & {"POST", "PUT", "PATCH"}:
            path = rule.rule
            for argument in rule.arguments:
                path = path.replace(f"<int:{argument}>", "1").replace(f"<{argument}>", "1")
            answer = client.open(
                path, method=method, data=deep, content_type="application/json", headers=admin
            )
            assert answer.status_code in (400, 413), (method, path)
            assert answer.json["category"] == "validation"
            seen += 1
    assert seen >= 8
    assert client.get("/api/v1/documents", headers=admin).status_code == 200
