"""`comatch index` and `comatch search` are encode and argsort, and what is known is not encoded again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_run import HTML, draw, run

from comatch import cli
from comatch.core.batch import Example
from comatch.data.items import read_items
from comatch.encoder import Encoder
from comatch.errors import ImageError, SearchError
from comatch.search.index import Index
from comatch.search.update import update


@pytest.fixture(scope="module")
def other(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model but for one number."""
    encoder = Encoder.load(model)
    encoder.backbone.rows.data[0, 0] += 1
    return encoder.save(tmp_path_factory.mktemp("cli") / "other")


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of examples of every forward pass from now on."""
    counts: list[int] = []
    plain = Encoder.forward

    def counting(self: Encoder, examples: Sequence[Example], *rest: Any) -> Any:
        counts.append(len(examples))
        return plain(self, examples, *rest)

    monkeypatch.setattr(Encoder, "forward", counting)
    return counts


# --- index and search


def test_index_and_search_are_encode_and_argsort(
    model: Path, encoder: Encoder, pictures: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    ran = run("index", model, pictures, "--out", index, "--json")
    done = ran.objects[0]
    assert ran.code == 0 and done["added"] == done["encoded"] == done["rows"] == 6 and not done["bad"]
    ids = [f"s{i}.png" for i in range(6)]
    stored = encoder.encode([pictures / id for id in ids])
    queries: list[tuple[Sequence[object], Any]] = [
        (("a red circle",), "a red circle"),
        (("--image", pictures / "s2.png"), pictures / "s2.png"),
        (("what?", "--image", pictures / "s2.png"), [pictures / "s2.png", "what?"]),
    ]
    for args, query in queries:
        scores = stored @ encoder.encode([query])[0]
        order = np.argsort(-scores)[:4]
        hits = run("search", index, *args, "-k", 4, "--json").objects
        assert [hit["id"] for hit in hits] == [ids[i] for i in order]
        np.testing.assert_allclose([hit["score"] for hit in hits], scores[order], atol=1e-6)
        assert [hit["rank"] for hit in hits] == [1, 2, 3, 4]
        assert hits[0]["image"] == str((pictures / hits[0]["id"]).resolve())
        assert hits[0]["margin"] == pytest.approx(hits[0]["score"] - hits[1]["score"], abs=1e-6)
    table = run("search", index, "a red circle", "-k", 2)
    found = run("search", index, "a red circle", "-k", 2, "--json").objects
    assert table.code == 0 and len(table.out.splitlines()) == 3
    assert [line.split()[-1] for line in table.out.splitlines()[1:]] == [hit["id"] for hit in found]
    many = run("search", index, "-", "-k", 2, "--json", stdin="a blue square\na red circle\n").objects
    assert [hit["query"] for hit in many] == ["a blue square"] * 2 + ["a red circle"] * 2
    assert [hit["id"] for hit in many[2:]] == [hit["id"] for hit in found]


def state(index: Path) -> dict[str, tuple[str, bytes]]:
    """Id -> digest and vector of every row."""
    with Index.open(index) as opened:
        return {id: (opened.get(id)["digest"], opened.vectors([id]).tobytes()) for id in opened}


def test_a_second_index_encodes_only_what_is_new(
    model: Path, encoder: Encoder, pictures: Path, tmp_path: Path, forwarded: list[int]
) -> None:
    index = tmp_path / "index"
    assert run("index", model, pictures, "--out", index).code == 0
    first = state(index)
    assert sum(forwarded) == 6
    forwarded.clear()
    again = run("index", model, pictures, "--out", index)
    assert again.code == 0 and "6 unchanged" in again.out and "0 encoded" in again.out
    assert forwarded == [] and state(index) == first

    (pictures / "s0.png").rename(pictures / "renamed.png")
    (pictures / "s1.png").unlink()
    draw(pictures / "below", [7])
    shutil.copy(pictures / "below" / "s7.png", pictures / "below" / "copy.png")
    shutil.copy(pictures / "below" / "s7.png", pictures / "s2.png")
    done = run("index", model, pictures, "--out", index, "--json").objects[0]
    counts = {key: done[key] for key in ("added", "changed", "unchanged", "removed", "encoded", "rows")}
    assert counts == {"added": 3, "changed": 1, "unchanged": 3, "removed": 2, "encoded": 1, "rows": 7}
    assert sum(forwarded) == 1
    now = state(index)
    assert now["renamed.png"] == first["s0.png"] and "s0.png" not in now and "s1.png" not in now
    assert now["s2.png"] == now["below/copy.png"] == now["below/s7.png"] != first["s2.png"]
    run("index", model, pictures, "--out", tmp_path / "fresh")
    fresh = state(tmp_path / "fresh")
    assert {id: digest for id, (digest, _) in now.items()} == {id: digest for id, (digest, _) in fresh.items()}
    for id, (_, vector) in now.items():
        np.testing.assert_allclose(np.frombuffer(vector), np.frombuffer(fresh[id][1]), atol=2e-6)


def test_index_goes_on_past_bad_files_and_forgets_what_went_bad(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    (pictures / "zero.png").touch()
    (pictures / "page.jpg").write_bytes(HTML)
    ran = run("index", model, pictures, "--out", index, "--json")
    assert ran.code == cli.QUARANTINED and ran.objects[0]["added"] == 6
    assert sorted(one["id"] for one in ran.objects[0]["bad"]) == ["page.jpg", "zero.png"]
    assert "page.jpg" in ran.err and "zero.png" in ran.err
    (pictures / "s4.png").write_bytes((pictures / "s4.png").read_bytes()[:300])
    ran = run("index", model, pictures, "--out", index)
    assert ran.code == cli.QUARANTINED and "3 bad" in ran.out and "1 removed" in ran.out
    assert "s4.png" not in state(index) and len(state(index)) == 5


def test_rows_below_an_unreadable_folder_stay(encoder: Encoder, pictures: Path, tmp_path: Path) -> None:
    draw(pictures / "below", [7])
    items = list(read_items(pictures))
    index = Index.create(tmp_path / "index", encoder.fingerprint, encoder.dim)
    assert update(index, encoder, items, source="here", prune=True).added == 7
    closed = ("below", ImageError("folder cannot be read"))
    seen = [item for item in items if item[0] not in ("below/s7.png", "s5.png")]
    done = update(index, encoder, [*seen, closed], source="here", prune=True)
    assert done.removed == 1 and "below/s7.png" in index and "s5.png" not in index
    assert update(index, encoder, [(".", ImageError("closed"))], source="here", prune=True).removed == 0


def test_an_index_of_another_model_is_refused_with_both_names(
    model: Path, other: Path, pictures: Path, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    run("index", model, pictures, "--out", index)
    before = state(index)
    names = {Encoder.load(model).fingerprint, Encoder.load(other).fingerprint}
    assert len(names) == 2
    for args in (("index", other, pictures, "--out", index), ("search", index, "x", "--model", other)):
        ran = run(*args)
        assert ran.code == cli.FAILED and ran.out == "" and all(name in ran.err for name in names)
    assert state(index) == before


def test_a_model_that_moved_is_named_and_can_be_given(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(model, mine)
    run("index", mine, pictures, "--out", tmp_path / "index")
    found = run("search", tmp_path / "index", "a red circle").out
    mine.rename(tmp_path / "moved")
    ran = run("search", tmp_path / "index", "a red circle")
    assert ran.code == cli.FAILED and str(mine) in ran.err and "--model" in ran.err
    assert run("search", tmp_path / "index", "a red circle", "--model", tmp_path / "moved").out == found != ""
    assert run("search", tmp_path / "none", "x").code == cli.FAILED


def test_two_inputs_never_overwrite_each_other_and_a_moved_one_is_known(
    model: Path, encoder: Encoder, pictures: Path, tmp_path: Path, forwarded: list[int]
) -> None:
    index, second = tmp_path / "index", tmp_path / "second"
    run("index", model, pictures, "--out", index)
    draw(second, [1, 8])
    ran = run("index", model, second, "--out", index)
    assert ran.code == cli.FAILED and "s1.png" in ran.err and str(pictures) in ran.err and str(second) in ran.err
    assert len(state(index)) == 6
    (second / "s1.png").unlink()
    ran = run("index", model, second, "--out", index)
    assert ran.code == 0 and len(state(index)) == 7, "the first folder's rows must stay"
    forwarded.clear()
    pictures.rename(tmp_path / "moved")
    (tmp_path / "moved" / "s0.png").unlink()
    done = run("index", model, tmp_path / "moved", "--out", index, "--json").objects[0]
    assert (done["changed"], done["removed"], done["encoded"], done["rows"]) == (5, 1, 0, 6)
    assert forwarded == []
    hit = run("search", index, "--image", tmp_path / "moved" / "s2.png", "-k", 1, "--json").objects[0]
    assert hit["image"] == str(tmp_path / "moved" / "s2.png")


def test_update_itself_refuses_another_encoder(other: Path, pictures: Path, tmp_path: Path) -> None:
    index = Index.create(tmp_path / "index", "some other", 32)
    with pytest.raises(SearchError, match="some other"):
        update(index, Encoder.load(other), read_items(pictures))


def test_search_shows_what_a_person_reads_of_a_row(model: Path, pictures: Path, tmp_path: Path) -> None:
    """A label stands beside the vector and has no part in it; without a table there is none."""
    table = tmp_path / "t.csv"
    table.write_text("id,file,label,tags\n" + "".join(f"r{i},pictures/s{i}.png,scene {i},{'tag ' * 30}{i}\n" for i in range(6)))
    plain, picture = tmp_path / "plain", pictures / "s2.png"
    run("index", model, pictures, "--out", plain)
    for args, label in (((), "scene 2"), (("--label-column", "tags"), "tag " * 30 + "2")):
        index = tmp_path / f"index{len(args)}"
        assert run("index", model, table, "--image-column", "file", "--out", index, *args).code == 0
        hits = run("search", index, "--image", picture, "--json").objects
        assert (hits[0]["id"], hits[0]["label"]) == ("r2", label)
        line = run("search", index, "--image", picture, "-k", 1).out.splitlines()[1]
        assert line.split(maxsplit=4)[3:] == ["r2", label if len(label) <= 60 else label[:57] + "..."]
        bare = run("search", plain, "--image", picture, "--json").objects
        assert [hit["score"] for hit in bare] == [hit["score"] for hit in hits] and "label" not in bare[0]
    again = run("index", model, table, "--image-column", "file", "--out", index, "--json").objects[0]
    assert (again["changed"], again["encoded"]) == (6, 0), "another label costs no encoding"
    both = run("index", model, table, "--image-column", "file", "--text-column", "label", "--out", tmp_path / "both")
    assert both.code == 0 and "label" not in run("search", tmp_path / "both", "scene", "--json").objects[0]
    for source in (table, pictures):
        ran = run("index", model, source, "--out", tmp_path / "none", "--label-column", "titel")
        assert ran.code == cli.FAILED and "'titel'" in ran.err and not (tmp_path / "none").exists()


def test_texts_in_an_index(model: Path, encoder: Encoder, tmp_path: Path) -> None:
    index, texts = tmp_path / "index", ["a red circle", "a blue square", "a red circle", "\x1b[31mred"]
    ran = run("index", model, "-", "--out", index, "--json", stdin="".join(f"{text}\n" for text in texts))
    assert ran.code == 0 and ran.objects[0]["encoded"] == 3 and ran.objects[0]["added"] == 4
    hit = run("search", index, "a blue square", "-k", 1, "--json").objects[0]
    assert (hit["id"], hit["text"]) == ("1", "a blue square") and hit["score"] == pytest.approx(1, abs=1e-6)
