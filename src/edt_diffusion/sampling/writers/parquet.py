"""Parquet files that `datasets` reads: encoded pictures, labels and seeds."""

import io
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...util.errors import UserError
from ...util.files import atomic_path
from ...util.pictures import png_bytes, to_pil
from .batches import BatchWriter

# Pictures in a file; a file has whole batches.
_SHARD = 1024


class ParquetWriter(BatchWriter):
    """`samples-00000.parquet` and so on.

    Columns: `image` (struct of PNG bytes and a name), `label` (a `ClassLabel`) of a model with classes, `seed`. A row
    group is a batch.
    """

    def prepare(self) -> None:
        try:
            import datasets
            import pyarrow.parquet
        except ImportError:
            raise UserError("--to parquet needs datasets: run pip install 'edt-diffusion[train]'") from None
        del datasets, pyarrow
        if len(set(self.plan.class_names)) != len(self.plan.class_names):
            raise UserError("two classes have the same name, which datasets does not allow: use --to png or npz")

    @property
    def _batches_of_shard(self) -> int:
        return max(_SHARD // self.plan.batch, 1)

    @cached_property
    def _groups(self) -> dict[int, list[int]]:
        """Pictures in each row group of the files that are there."""
        return {shard: groups for shard in self._shards() if (groups := self._groups_of(shard)) is not None}

    def _shards(self) -> range:
        return range(-(-self.plan.batches // self._batches_of_shard))

    def _shard_path(self, shard: int) -> Path:
        return self.folder / f"samples-{shard:05d}.parquet"

    def _groups_of(self, shard: int) -> list[int] | None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            facts = pq.read_metadata(self._shard_path(shard))
        except (OSError, pa.ArrowException):
            return None
        return [facts.row_group(group).num_rows for group in range(facts.num_row_groups)]

    def _wanted(self, shard: int) -> range:
        """The batches of a shard."""
        first = shard * self._batches_of_shard
        return range(first, min(first + self._batches_of_shard, self.plan.batches))

    def keeps(self, batch: int) -> bool:
        shard, group = divmod(batch, self._batches_of_shard)
        groups = self._groups.get(shard, [])
        return group < len(groups) and groups[group] == len(self.plan.rows(batch))

    def kept(self, batch: int) -> np.ndarray | None:
        return np.stack(list(self._decoded(batch))) if self.keeps(batch) else None

    def _decoded(self, batch: int) -> Iterator[np.ndarray]:
        import pyarrow.parquet as pq

        shard, group = divmod(batch, self._batches_of_shard)
        with pq.ParquetFile(self._shard_path(shard)) as file:
            column = file.read_row_group(group, columns=["image"]).column("image")
        for entry in column:
            with Image.open(io.BytesIO(entry.as_py()["bytes"])) as picture:
                yield np.asarray(picture).reshape(self.shape)

    def finish(self) -> list[Path]:
        for shard in self._shards():
            if any(not self.keeps(batch) for batch in self._wanted(shard)):
                with atomic_path(self._shard_path(shard)) as temporary:
                    self._write_shard(temporary, shard)
        del self._groups
        self.tidy()
        return [self._shard_path(shard) for shard in self._shards()]

    def _write_shard(self, path: Path, shard: int) -> None:
        import pyarrow as pa
        from datasets import ClassLabel, Features, Value
        from datasets import Image as ImageFeature

        columns: dict[str, Any] = {"image": ImageFeature()}
        if self.plan.labels is not None:
            columns["label"] = ClassLabel(names=list(self.plan.class_names))
        schema = Features({**columns, "seed": Value("int64")}).arrow_schema
        with _new_table(path, schema) as file:
            for batch in self._wanted(shard):
                rows = self.plan.rows(batch)
                values: dict[str, Any] = {"image": self._encoded(batch), "seed": [self.plan.seeds[r] for r in rows]}
                if self.plan.labels is not None:
                    values["label"] = self.plan.labels[rows.start : rows.stop].tolist()
                table = pa.Table.from_pydict({name: values[name] for name in schema.names}, schema=schema)
                file.write_table(table, row_group_size=len(rows))

    def _encoded(self, batch: int) -> list[dict[str, Any]]:
        files, out = self._names, []
        for row, picture in zip(self.plan.rows(batch), self.batch(batch), strict=True):
            notes = self.notes.of(
                self.plan.seeds[row], self.plan.label(row), self.plan.class_of(row), self.plan.class_names
            )
            out.append({"bytes": png_bytes(to_pil(np.asarray(picture)), notes), "path": files[row]})
        return out

    @cached_property
    def _names(self) -> list[str]:
        return self.plan.files()

    def picture(self, row: int) -> np.ndarray:
        batch, place = divmod(row, self.plan.batch)
        return list(self._decoded(batch))[place]


@contextmanager
def _new_table(path: Path, schema: Any) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with closing(pq.ParquetWriter(path, schema, compression="none")) as file:  # PNGs do not get smaller
        yield file
