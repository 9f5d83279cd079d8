"""What commands print: their last line, or JSON for programs; and what they keep libraries from printing."""

import json
import os
import sys
from typing import Any


def finish(message: str, facts: dict[str, Any], as_json: bool) -> None:
    """Print `message`, or with `as_json` one line of JSON instead."""
    print(json.dumps(facts) if as_json else message, flush=True)


def leave_at_once() -> None:
    """End this process of a job with success, without the interpreter's clean-up, in which gloo may abort.

    A launcher would call the job failed, though all is done and written.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def quiet_libraries() -> None:
    """Keep diffusers from logging errors that we report ourselves, and from drawing bars while it loads files."""
    import warnings

    from diffusers.utils import logging

    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    # accelerate hands torch's DDP an argument that torch means to rename.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    # Nothing is changed in place on what the network returns, of which a sharded one warns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
