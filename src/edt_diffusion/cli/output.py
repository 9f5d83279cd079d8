"""The last line of a command: what it wrote, and where; as JSON for programs."""

import json
from typing import Any


def finish(message: str, facts: dict[str, Any], as_json: bool) -> None:
    """Print `message`, or with `as_json` one line of JSON instead."""
    print(json.dumps(facts) if as_json else message)
