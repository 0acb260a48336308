"""The WSGI entry point: gunicorn serves `wsgi:app`."""

from muset.app import create_app

app = create_app()
