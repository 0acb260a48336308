"""Where the guide looks for it: `locust -f tests/locustfile.py`."""

import runpy
from pathlib import Path

globals().update(runpy.run_path(str(Path(__file__).parents[1] / "locust" / "locustfile.py")))
