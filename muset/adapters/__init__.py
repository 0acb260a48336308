"""One outside system per file; `muset.app` chooses them."""
