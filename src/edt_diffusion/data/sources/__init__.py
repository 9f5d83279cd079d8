"""What a path is: files, tables, archives, a dataset of the hub or a built-in set, here or behind a URL.

`find_source` tells them apart. A source is a *reader* (encoded bytes by row number), labels, class names, and a list
of what was passed over. A new kind of source is one function that returns a `Source`; decoding, checking, cropping and
caching are the same for all.

- `base`      what a source is
- `find`      the one entry
- `labels`    the rule by which labels become classes
- `options`   what messages call the options
- `listing`   what lies below a folder
- `storage`   where files lie: a local folder, or a URL
- `folder`    a folder per class, or all pictures in one folder
- `metadata`  a folder with `metadata.csv` or `metadata.jsonl`
- `archives`  tar files, WebDataset or folders
- `tables`    rows of a table, wherever it comes from
- `table_files` Parquet and Arrow files
- `hub`       what `datasets` has saved or loads itself
"""

from .base import EMPTY_CLASS, Problem, Reader, Row, Source, StreamedSource, split_of, stable_key
from .find import find_source

__all__ = [
    "EMPTY_CLASS",
    "Problem",
    "Reader",
    "Row",
    "Source",
    "StreamedSource",
    "find_source",
    "split_of",
    "stable_key",
]
