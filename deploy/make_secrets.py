"""Makes the secrets that compose.yaml names, each once; none is shown.

python3 make_secrets.py
"""

import os
import secrets
from pathlib import Path

FOLDER = Path(__file__).parent / "secrets"


def main() -> None:
    """Write what is not there yet; what is there stays."""
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    password = _kept("postgres_password", secrets.token_hex(24))
    _kept("database_url", f"postgresql://muset:{password}@postgres:5432/muset")
    _kept("admin_key", f"msk_{secrets.token_urlsafe(32)}")
    _kept("grafana_password", secrets.token_urlsafe(24))


def _kept(name: str, value: str) -> str:
    """Write a secret unless there is one; returns the one that holds."""
    path = FOLDER / name
    try:
        # The folder is closed to others; the users of the containers read the files in it.
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444), "w") as file:
            file.write(value)
        print(f"{path} made")
    except FileExistsError:
        print(f"{path} kept")
    return path.read_text()


if __name__ == "__main__":
    main()
