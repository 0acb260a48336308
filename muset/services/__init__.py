"""The rules of the service on plain values; no Flask, no database, no client library."""
