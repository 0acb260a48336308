"""The HTTP surface: parse, call one service, render."""
