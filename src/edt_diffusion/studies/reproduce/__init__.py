"""The paper's tables and figures (arXiv 2410.23788), reproduced on one's own pictures at one's own budget."""

from .request import Request
from .tables import TABLES, Table, default_folder, find_table, listing, reproduce

__all__ = ["TABLES", "Request", "Table", "default_folder", "find_table", "listing", "reproduce"]
