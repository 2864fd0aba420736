"""The exact index: every search compares the query with every stored vector, so nothing is ever missed.

Good for some 200,000 rows of 1,024 dimensions on a laptop: 0.8 GB on disk, about 0.1 s a query
(specs/ecosystem.md section 4). The folder and its promises against crashes are in store.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from comatch.errors import SearchError
from comatch.search.store import Floats, Manifest, Record, Store

_NORM_TOLERANCE = 1e-3
_QUERY_BLOCK, _ROW_BLOCK = 32, 65_536


@dataclass(frozen=True)
class Hit:
    """One search result.

    rank        1 is the best
    score       cosine of query and row, to six decimals
    margin      how far the score lies above that of the next rank, to six decimals; None for the last row
    percentile  share of the index, in percent, that scores lower, to four decimals
    row         what was stored beside the vector: text, image, digest, ...
    """

    rank: int
    id: str
    score: float
    margin: float | None
    percentile: float
    row: Record


class Index:
    """Vectors, each with an id and a row, searched exactly. One row per id: adding an id again replaces it.

    Make one with `Index.create`, read one with `Index.open`. A change is on disk when its call returns; if
    the call raises, the index is as it was before.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._place: dict[str, int] = {}
        self._rows: dict[str, Record] = {}
        self._read()

    @classmethod
    def create(
        cls, path: str | Path, fingerprint: str, dim: int, *, prompt: str = "", model: str = ""
    ) -> Index:
        """A new index in folder `path` for one encoder: fingerprint, dim, prompt, and where it came from."""
        if not fingerprint or dim < 1:
            raise SearchError(
                f"fingerprint {fingerprint!r} and dim {dim}: an index needs its encoder's fingerprint and a "
                "dim above 0"
            )
        return cls(Store.create(Path(path), Manifest(fingerprint, dim, prompt, model=model)))

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        fingerprint: str | None = None,
        dim: int | None = None,
        prompt: str | None = None,
    ) -> Index:
        """The index in folder `path`. Say what your encoder is, and another encoder's index is refused."""
        store = Store(Path(path))
        own = asdict(store.manifest)
        for key, given in (("fingerprint", fingerprint), ("dim", dim), ("prompt", prompt)):
            if given is not None and given != own[key]:
                raise SearchError(
                    f"{path} was made with {key} {own[key]!r}, and this encoder has {key} {given!r}: their "
                    "vectors do not compare. "
                    "Load the encoder that made the index, or make a new index with this one"
                )
        return cls(store)

    @property
    def fingerprint(self) -> str:
        """Of the encoder that made the vectors."""
        return self._store.manifest.fingerprint

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._store.manifest.dim

    def add(self, ids: Sequence[str], vectors: npt.ArrayLike, rows: Sequence[Record] | None = None) -> None:
        """Store unit vectors [n, dim] under n ids, each with a row fit for JSON. Known ids are replaced."""
        new = self._checked(vectors, "vector")
        rows = [{} for _ in ids] if rows is None else rows
        if not len(ids) == len(new) == len(rows):
            raise SearchError(
                f"{len(ids)} ids, {len(new)} vectors and {len(rows)} rows; the three numbers must be equal"
            )
        if not all(isinstance(i, str) and i for i in ids) or len(set(ids)) < len(ids):
            odd = [i for n, i in enumerate(ids) if not (isinstance(i, str) and i) or i in ids[:n]]
            raise SearchError(f"ids are non-empty strings, each once in a call; look at {odd[:3]}")
        if ids:
            self._append([{**row, "id": i} for i, row in zip(ids, rows, strict=True)], new)

    def delete(self, ids: Iterable[str]) -> None:
        """Forget these ids. Their vectors leave the disk by `compact`, or once most stored ones are dead."""
        gone = list(dict.fromkeys(ids))
        unknown = [i for i in gone if i not in self._place]
        if unknown:
            raise SearchError(f"not in the index: {unknown[:3]}; it holds {len(self)} ids")
        if gone:
            self._append([{"deleted": gone}], np.empty((0, self.dim), np.float32))

    def compact(self) -> None:
        """Rewrite the files without dead rows."""
        with self._writing():
            ids = list(self._place)
            blocks = (self.vectors(ids[at : at + _ROW_BLOCK]) for at in range(0, len(ids), _ROW_BLOCK))
            self._store.rewrite([self._rows[i] for i in ids], blocks)
            self._read()

    def search(self, vector: npt.ArrayLike, k: int = 10) -> list[Hit]:
        """The k best rows for one unit vector, [dim] or [1, dim]; fewer where the index is smaller.

        Best first, equal scores in order of arrival.
        """
        found = self.search_many(np.atleast_2d(np.asarray(vector, dtype=np.float32)), k)
        if len(found) != 1:
            raise SearchError(f"search takes one vector, {len(found)} were given; use search_many")
        return found[0]

    def search_many(self, vectors: npt.ArrayLike, k: int = 10) -> list[list[Hit]]:
        """`search` for each row of unit vectors [n, dim]."""
        if k < 1:
            raise SearchError(f"k is {k}; ask for 1 hit or more")
        queries = self._checked(vectors, "query")
        ids = list(self._place)
        living = np.fromiter(self._place.values(), np.int64, len(ids))
        found = []
        for start in range(0, len(queries), _QUERY_BLOCK):
            scores = self._scores(queries[start : start + _QUERY_BLOCK])[:, living]
            found += [self._hits(row, ids, k) for row in scores]
        return found

    def get(self, id: str) -> Record:
        """The row stored under an id."""
        if id not in self._rows:
            raise SearchError(f"{id!r} is not in the index; it holds {len(self)} ids")
        return self._rows[id]

    def vectors(self, ids: Sequence[str]) -> Floats:
        """The vectors stored under these ids: [n, dim]."""
        for id in ids:
            self.get(id)
        return np.array(self._matrix[[self._place[id] for id in ids]], dtype=np.float32).reshape(
            len(ids), self.dim
        )

    def known(self, digests: Iterable[str]) -> dict[str, str]:
        """Those digests that some row has as its "digest", with its id: no need to encode them again."""
        held = {row["digest"]: id for id, row in self._rows.items() if "digest" in row}
        return {digest: held[digest] for digest in digests if digest in held}

    def stats(self) -> dict[str, Any]:
        """The manifest, the number of dead rows, and the bytes on disk."""
        manifest = self._store.manifest
        size = sum(path.stat().st_size for path in self._store.files)
        return {**asdict(manifest), "dead": manifest.written - len(self), "bytes": size}

    def close(self) -> None:
        """Let go of the files; the index is empty to its user from then on."""
        self._place, self._rows = {}, {}
        self._matrix = np.empty((0, self.dim), np.float32)

    def __len__(self) -> int:
        return len(self._place)

    def __contains__(self, id: object) -> bool:
        return id in self._place

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _scores(self, queries: Floats) -> Floats:
        """Cosines with every written vector, [queries, written], to six decimals.

        Float32 products are sure of no more: equal vectors would differ in the last bit by their place.
        """
        blocks = [
            queries @ self._matrix[at : at + _ROW_BLOCK].T for at in range(0, len(self._matrix), _ROW_BLOCK)
        ]
        return np.concatenate([np.empty((len(queries), 0), np.float32), *blocks], axis=1).round(6)

    def _hits(self, scores: Floats, ids: list[str], k: int) -> list[Hit]:
        """The k best of the living rows; scores: [len(ids)]."""
        ordered = np.sort(scores)
        kept = min(k + 1, len(scores))
        best = np.flatnonzero(scores >= ordered[len(scores) - kept]) if kept else np.empty(0, np.int64)
        best = best[np.argsort(-scores[best], kind="stable")][:kept]
        hits = []
        for rank, at in enumerate(best[:k], start=1):
            score = round(float(scores[at]), 6)
            margin = round(score - float(scores[best[rank]]), 6) if rank < kept else None
            percentile = round(100 * int(np.searchsorted(ordered, scores[at])) / len(scores), 4)
            hits.append(Hit(rank, ids[at], score, margin, percentile, self._rows[ids[at]]))
        return hits

    def _checked(self, vectors: npt.ArrayLike, what: str) -> Floats:
        """The vectors as float32 [n, dim]; refused where the shape is wrong or a row is not a unit vector."""
        array = np.asarray(vectors, dtype=np.float32)
        if array.ndim != 2 or array.shape[1] != self.dim:
            raise SearchError(
                f"{what} shape {list(array.shape)} does not fit this index: [n, {self.dim}], made by "
                f"{self.fingerprint}"
            )
        norms = np.linalg.norm(array, axis=1)
        odd = np.flatnonzero(~(np.abs(norms - 1) <= _NORM_TOLERANCE))
        if len(odd):
            raise SearchError(
                f"{what} {odd[0]} has length {norms[odd[0]]:.4g}, and {len(odd)} of {len(array)} are not "
                "unit vectors. NaN, zero and "
                "unnormalised vectors are refused; pass what Encoder.encode returns"
            )
        return array

    def _append(self, records: list[Record], vectors: Floats) -> None:
        with self._writing():
            written = self._store.manifest.written
            born = sum(record["id"] not in self._place for record in records if "id" in record)
            died = sum(
                id in self._place for record in records if "id" not in record for id in record["deleted"]
            )
            self._store.append(records, vectors, len(self) + born - died)
            self._apply(records, written)
            self._matrix = self._store.matrix()
        if self._store.manifest.written > 2 * len(self):
            self.compact()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """The writers' lock, with what other writers did meanwhile taken in."""
        with self._store.writing():
            if self._store.refresh():
                self._read()
            yield

    def _read(self) -> None:
        """Take in the whole folder; once more if a compaction swapped the files while we looked."""
        try:
            self._read_once()
        except SearchError:
            if not self._store.refresh():
                raise
            self._read_once()

    def _read_once(self) -> None:
        self._place, self._rows = {}, {}
        self._apply(self._store.records(), 0)
        self._matrix = self._store.matrix()
        counted = self._store.manifest.count
        if len(self) != counted:
            raise SearchError(
                f"{self._store.folder} counts {counted} rows and holds {len(self)}; the index is damaged, "
                "index again"
            )

    def _apply(self, records: Iterable[Record], written: int) -> None:
        """Take in lines of the rows file whose first vector is number `written`."""
        for record in records:
            for id in record.get("deleted", ()) if "id" not in record else (record["id"],):
                self._place.pop(id, None)
                self._rows.pop(id, None)
            if "id" in record:
                self._place[record["id"]] = written
                self._rows[record["id"]] = record
                written += 1
