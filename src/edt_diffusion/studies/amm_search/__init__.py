"""`edt amm search`: where attention modulation helps a trained model, found without training.

- `search`    what a user names -> an answer, confirmed on fresh seeds
- `halving`   the course: successive halving of single blocks, then of combinations
- `features`  the pictures' features, kept block by block
"""

from .halving import Course, Plan, Rung
from .job import Outcome, Request, search
from .report import conclusion, lines

__all__ = ["Course", "Outcome", "Plan", "Request", "Rung", "conclusion", "lines", "search"]
