"""What the service shows of itself."""

import pytest

from muset.ports import Role


@pytest.mark.claim(
    "A secret planted in message, details, header, query, local variable and chained cause is "
    "found nowhere in metrics"
)
def test_no_secret_in_metrics(app, client, admin, prove):
    """Whatever a request bears and an error says, no label has it."""
    from flask_muset.errors import ExternalServiceError

    planted = [f"hunter2-{place}-{'x' * 24}" for place in range(6)]
    message, detail, header, query, local, cause = planted

    def fail():
        password = local
        try:
            raise KeyError(cause)
        except KeyError as error:
            text = f"password={message} of {len(password)} letters"
            raise ExternalServiceError(text, details={"api_key": detail}) from error

    app.view_functions["documents.list_documents"] = fail
    client.get(f"/api/v1/documents?token={query}", headers=admin | {"X-Api-Key": header})
    client.get(f"/nowhere/{query}", headers={"Authorization": f"Bearer {header}"})
    client.open("/api/v1/documents", method=query.upper())
    text = client.get("/metrics").text
    found = [secret for secret in planted if secret.lower() in text.lower()]
    prove.figure(f"{len(found)} of {len(planted)} found")
    assert found == []
    assert 'muset_errors_total{category="external_service",severity="high"} 1.0' in text
    assert 'endpoint="__unmatched__"' in text
    assert 'method="_OTHER"' in text


def test_metrics_are_for_this_machine_and_admins(client, admin, services):
    """Another machine needs an admin's key, and behind a proxy nobody is this machine."""
    away = {"REMOTE_ADDR": "192.0.2.1"}
    key = services.keys.create("m@example.org", Role.MEMBER)
    member = {"Authorization": f"Bearer {key}"}
    assert client.get("/metrics").status_code == 200
    assert client.get("/metrics", environ_base=away).status_code == 403
    assert client.get("/metrics", headers=member, environ_base=away).status_code == 403
    assert client.get("/metrics", headers=admin, environ_base=away).status_code == 200
    assert client.get("/metrics", headers={"X-Forwarded-For": "192.0.2.1"}).status_code == 403
