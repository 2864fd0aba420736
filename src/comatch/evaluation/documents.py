"""The 24 visual-document datasets of MMEB-V2: BEIR triples of tables. Source: specs/mmeb.md 3.

    <Dataset>/queries/test-*.parquet    query-id, query
    <Dataset>/corpus/test-*.parquet     corpus-id, image          image: bytes in the table, or a path
    <Dataset>/qrels/test-*.parquet      query-id, corpus-id, score    above 0 counts; of equal pairs the highest score
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from comatch.content import Image
from comatch.data.tables import Table
from comatch.errors import EvaluationError
from comatch.evaluation.archives import Cell, Pictures, stamp_of
from comatch.evaluation.building import Building
from comatch.evaluation.layouts import check_columns, text_of

PARTS = ("queries", "corpus", "qrels")


def read_documents(build: Building, tables: Mapping[str, Table], pictures: Pictures) -> None:
    """All queries of a dataset, and the pages of its corpus.

    Raises EvaluationError for wrong columns, and for pages that are judged and not there.
    """
    queries, corpus, qrels = (tables[part] for part in PARTS)
    wanted = check_columns(corpus, ("corpus-id", "image"))[:1]
    # A path is read with the row; bytes are read when the page is encoded.
    inside = corpus.type_of("image") is not None and str(corpus.type_of("image")) not in ("string", "large_string")
    stamp = stamp_of(corpus.path)
    for number, row in enumerate(corpus.rows(wanted if inside else [*wanted, "image"])):
        where = f"{corpus.path}, row {number}"
        name = str(row["corpus-id"])
        page = Image(Cell(corpus.path, number, "image", stamp)) if inside else pictures.image(text_of(row, "image", where))
        build.candidate("", name, lambda page=page: build.spec.filled("", (page,), target=True))  # type: ignore[misc]
    judged = defaultdict[str, dict[int, float]](dict)
    for row in qrels.rows(check_columns(qrels, ("query-id", "corpus-id", "score"))):
        query, page_id, score = str(row["query-id"]), str(row["corpus-id"]), float(row["score"])
        if score > 0:
            place = build.known("", page_id, f"{qrels.path}: query {query}")
            judged[query][place] = max(score, judged[query].get(place, 0.0))
    for row in queries.rows(check_columns(queries, ("query-id", "query"))):
        query = str(row["query-id"])
        if query not in judged:
            raise EvaluationError(f"{queries.path}: query {query} has no page that counts in {qrels.path}")
        build.query(query, build.spec.filled(text_of(row, "query", queries.path)), (), list(judged[query]), list(judged[query].values()))
