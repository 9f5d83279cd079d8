"""Looking at pictures and latent stores, and checking them.

- `pictures`  facts of pictures of any source, in one pass
- `stores`    facts of a latent store
- `verify`    whether every byte is as it should be
- `compare`   how well a store gives its pictures back
- `decoding`  a store's rows as pictures
- `sheets`    contact sheets
- `summary`   balance, duplicates, names that are safe to show or to write
- `text`      the facts for people
"""

from .compare import RoundTrip, compare_pictures, psnr
from .decoding import decode_rows, store_codec
from .pictures import inspect_pictures
from .stores import inspect_store
from .text import describe
from .verify import verify_pictures, verify_store

__all__ = [
    "RoundTrip",
    "compare_pictures",
    "decode_rows",
    "describe",
    "inspect_pictures",
    "inspect_store",
    "psnr",
    "store_codec",
    "verify_pictures",
    "verify_store",
]
