"""The forms in which a job's pictures are kept; one file per form.

- `base`     what a form is
- `png`      a PNG file per picture, in a folder per class
- `batches`  what the others share: batches as files until they are put together
- `npz`      one file in the layout of ADM's evaluator
- `parquet`  tables that `datasets` reads
"""

from .base import Writer
from .npz import NpzWriter
from .parquet import ParquetWriter
from .png import PngWriter

WRITERS: dict[str, type[Writer]] = {"png": PngWriter, "npz": NpzWriter, "parquet": ParquetWriter}

__all__ = ["WRITERS", "Writer"]
