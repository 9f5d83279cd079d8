"""Latent stores in other forms: `edt data convert`.

- `npy`       the layout of the authors of DiT and EDT, both ways
- `npy_files` the files of that layout
- `parquet`   tables that `datasets` reads
- `images`    decoded pictures, to be looked at
- `folders`   outcomes that appear whole or not at all
"""

from .images import to_pictures
from .npy import from_npy, to_npy
from .npy_files import is_npy_layout
from .parquet import to_parquet

__all__ = ["from_npy", "is_npy_layout", "to_npy", "to_parquet", "to_pictures"]
