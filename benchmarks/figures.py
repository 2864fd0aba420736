"""How the figures of each results file are read. A ratio whose record does not say that both ways gave the same is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
Reader = Callable[["Record"], Iterator["Figure"]]


class Refused(SystemExit):
    """A file that cannot be shown, and why."""


@dataclass(frozen=True)
class Figure:
    """One measured figure. ours, theirs: in absolute numbers. low, high: of a round. missing: why there is no value. equal: what was equal.

    noise: the spread of our own rounds where it could explain the ratio. counted: whether it is held against the target.
    """

    case: str
    value: float | None
    ours: str = ""
    theirs: str = ""
    low: float | None = None
    high: float | None = None
    equal: str = ""
    noise: float | None = None
    missing: str = ""
    counted: bool = True


def _speed(case: str, ratio: Record, rates: Sequence[float], unit: str, equal: str, counted: bool = True) -> Figure:
    """A ratio as `measure.ratio` writes it. rates: ours and theirs. equal: why the two may be compared; without it they may not."""
    if not equal:
        raise Refused(f"{case} has a ratio and no equality; a ratio of ways that do different things says nothing")
    ours, theirs = (f"{rate:,.0f} {unit}" if rate >= 100 else f"{rate:.3g} {unit}" for rate in rates)
    noise = None if ratio["above_noise"] else ratio.get("own_spread", 1.0)
    return Figure(case, ratio["of_medians"], ours, theirs, ratio["low"], ratio["high"], equal, noise, counted=counted)


def _close(case: str, found: Record | None, limit: float, what: str = "gradients") -> str:
    """Equality in words, from the largest difference as a share of the largest entry. Raises Refused without one or beyond the limit."""
    if not found or not found.get("difference", 1.0) <= limit:
        raise Refused(f"{case}: {what} are not equal ({found}); a ratio of ways that do different things says nothing")
    return f"{what} within {found['difference']:.0e} of the largest" if found["difference"] else f"{what} equal to the bit"


def _same(case: str, agreed: Record | None) -> str:
    """Equality in bf16, as `large.agreement` writes it. Raises Refused without it."""
    if not agreed or not agreed.get("equal"):
        raise Refused(f"{case} has a ratio, but gradients were not found equal ({agreed})")
    to, nine = agreed["cosine_to_float32"], agreed["cosine"]
    return f"gradients: cosine {nine:.5f}; to float32 ours {to['comatch']:.5f}, theirs {to['reference']:.5f}"


def steps(unit: str, of: Callable[[Record], str]) -> Reader:
    """stage1.json and stage2.json."""

    def read(record: Record) -> Iterator[Figure]:
        for name, row in record["speed"].items():
            rates = row[f"{unit}_per_second"]
            case = f"{name}, {of(row)}"
            equal = _close(case, row.get("agreed"), 1e-4)
            yield _speed(case, row["ratio"], (rates["comatch"], rates["reference"]), f"{unit}/s", equal)

    return read


def peaks(record: Record) -> Iterator[Figure]:
    """Peaks of stage1.json."""
    for name, row in record["memory"].items():
        case = f"{name}, {row['tokens']:,} tokens in one pass"
        equal = _close(case, row.get("agreed"), 1e-4)
        peaks = [f"{row['peak_bytes'][way] / 2**30:.2f} GiB" for way in ("comatch", "reference")]
        yield Figure(case, row["ratio"], *peaks, equal=equal)


def cached_losses(record: Record) -> Iterator[Figure]:
    """matching_step.json."""
    for model, row in record["models"].items():
        for way, found in row["ways"].items():
            if way != "comatch":
                case = f"{model} ({row['parameters'] / 1e6:.1f}M), {row['pairs']} pairs, against {way}"
                rates = [row["pairs"] / row["ways"][name]["median"] for name in ("comatch", way)]
                yield _speed(case, found["ratio"], rates, "pairs/s", _close(case, found.get("gradients"), 1e-4))


def encode(peers: Sequence[str]) -> Reader:
    """encode.json, against some of its ways."""
    def read(record: Record) -> Iterator[Figure]:
        for model, found in record["models"].items():
            for kind, row in found["kinds"].items():
                for peer in (peer for peer in peers if peer in row["ways"]):
                    way, case = row["ways"][peer], f"{model} ({found['parameters'] / 1e6:.1f}M), {kind}, against {peer}"
                    if not way.get("max_difference", 1.0) <= 1e-3 * way.get("between", 0.0):
                        raise Refused(f"{case}: vectors are not equal; a ratio says nothing")
                    equal = f"vectors within {way['max_difference']:.0e}, two items are {way['between']:.2f} apart"
                    rates = [row["ways"][name]["items_per_second"] for name in ("comatch", peer)]
                    yield _speed(case, way["ratio"], rates, "items/s", equal)

    return read


def images(record: Record) -> Iterator[Figure]:
    """images.json."""
    for size, row in record["sizes"].items():
        case = f"JPEG {size}, {row['visual_tokens']} visual tokens"
        if row.get("max_difference") != 0:
            raise Refused(f"{case}: pixels are not equal; a ratio says nothing")
        rates = [1e3 / row["milliseconds"][way] for way in ("ours", "stock")]
        yield _speed(case, row["ratio"], rates, "images/s and core", "normalised pixels equal to the bit")


def attention_equal(record: Record) -> Iterator[Figure]:
    """How far the ways of attention.json are apart."""
    for case, row in record["cases"].items():
        for way in ("dense", "padded", "stock"):
            if way in row["ways"]:
                yield Figure(f"{case}, against {way}", row["ways"][way]["apart"]["difference"])


def attention_speed(record: Record) -> Iterator[Figure]:
    """Times of attention.json."""
    for case, row in record["cases"].items():
        for way, found in row["ways"].items():
            if way != "segments":
                rates = [row["ways"][name]["median"] for name in ("segments", way)]
                what = f"{case}, against {way}"
                yield _speed(what, found["ratio"], rates, "s", _close(what, found.get("apart"), 1e-4, "states and gradients"))


def calls(record: Record) -> Iterator[Figure]:
    """Attention calls of attention.json."""
    for case, row in record["cases"].items():
        if "calls_per_layer" in row:
            calls = row["calls_per_layer"]
            yield Figure(f"{case}, {row['pictures']} pictures", calls["ours"], f"{calls['ours']:g}", f"{calls['stock']:g}")


def fill(record: Record) -> Iterator[Figure]:
    """Fill of packing.json; the planner's claim is best fit's."""
    _every_item_once(record)
    for row in record["fill"]:
        for name, way in row["ways"].items():
            case, found = f"{row['items']:,} items, passes of {row['budget']:,}, {name}", way["fill"]
            most = row["best_possible_fill"]["median"]
            told = f"{way['slots']['median']:.3f} slots a token", f"{row['padded_slots']['median']:.2f} slots padded; at best {most:.1%}"
            yield Figure(case, found["median"], *told, found["low"], found["high"], "every item once", counted=name == "best fit")


def balance(record: Record) -> Iterator[Figure]:
    """Imbalance of packing.json."""
    _every_item_once(record)
    for row in record["balance"]:
        dealt, plain = row["deal"], row["random"]
        case, theirs = f"batch {row['batch']:,} on {row['ranks']} ranks", f"{plain['median']:.3f}x at random"
        yield Figure(case, dealt["median"], f"{dealt['median']:.4f}x", theirs, dealt["low"], dealt["high"], "every item once")


def _every_item_once(record: Record) -> None:
    if record.get("every_item_once") is not True:
        raise Refused("it does not say that every item was planned once; a fill says nothing without that")


def gpu_steps(unit: str, parts: Sequence[str], ways: Sequence[str], first: str = "comatch") -> Reader:
    """Ratios of gpu-stage1.json and gpu-stage2.json. parts, ways: which of them; no ways are all."""

    def read(record: Record) -> Iterator[Figure]:
        yield from _left_out(record, parts)
        for part in (part for part in parts if part in record["parts"]):
            row = record["parts"][part]
            rates, agreed = row[f"{unit}_per_second"], row["agreed"]
            for way in (way for way in ways or rates if way != first):
                case = f"{part}, {row[unit]} {unit}, against {way}"
                if way in row["ratios"]:
                    one = agreed if "equal" in agreed else agreed[way]
                    yield _speed(case, row["ratios"][way], (rates[first], rates[way]), f"{unit}/s", _same(case, one))
                else:
                    yield Figure(case, None, missing=row["left_out"].get(way, "gradients were not found equal, so no ratio"))

    return read


def gpu_mfu(parts: Sequence[str]) -> Reader:
    """Useful FLOP over the measured matmul rate."""
    def read(record: Record) -> Iterator[Figure]:
        yield from _left_out(record, parts)
        for part in (part for part in parts if part in record["parts"]):
            row = record["parts"][part]
            top, mine = row["matmul_flop_per_second"], row["mfu"].get("comatch")
            if mine is None:
                yield Figure(part, None, missing=row["left_out"].get("comatch", "no time"))
            else:
                equal, ours = _same(part, row["agreed"]), f"{mine * top / 1e12:.0f} TFLOP/s useful"
                yield Figure(part, mine, ours, f"{top / 1e12:.0f} TFLOP/s matmul", equal=equal)

    return read


def gpu_loader(unit: str, parts: Sequence[str]) -> Reader:
    """What the loader costs."""
    def read(record: Record) -> Iterator[Figure]:
        yield from _left_out(record, parts)
        for part in (part for part in parts if part in record["parts"]):
            row = record["parts"][part]
            found, rates = row["loader_over_memory"], row[f"{unit}_per_second"]
            told = f"{rates['comatch']:.3g} {unit}/s", f"{rates['memory']:.3g} {unit}/s in memory"
            yield Figure(part, found["of_medians"], *told, found["low"], found["high"], "the same step")

    return read


def gpu_encode(peers: Sequence[str]) -> Reader:
    """gpu-encode.json, against some of its ways."""
    def read(record: Record) -> Iterator[Figure]:
        yield from _left_out(record, ("pictures", "mixed", "questions"))
        for kind, row in record["parts"].items():
            for peer in (peer for peer in peers if peer in row["ways"]):
                way, case = row["ways"][peer], f"{kind}, against {peer}"
                if "ratio" not in way:
                    yield Figure(case, None, missing=f"vectors differ (cosine {way['min_cosine']:.4f}), so no ratio")
                    continue
                if not way["min_cosine"] >= 0.999:
                    raise Refused(f"{case} has a ratio, but vectors have a cosine of {way['min_cosine']}")
                rates = [row["ways"][name]["items_per_second"] for name in ("comatch", peer)]
                yield _speed(case, way["ratio"], rates, "items/s", f"vectors: cosine {way['min_cosine']:.5f} at least")

    return read


def gpu_peaks(record: Record) -> Iterator[Figure]:
    """gpu-memory.json."""
    yield from _left_out(record, ("dora", "lora"))
    for kind, row in record["parts"].items():
        if row["ratio"] is None:
            yield Figure(kind, None, missing=f"no ratio: {row['agreed']['equal']=}, {row['sizes'][-1]['left_out']}")
            continue
        found = row["ratio"]
        ours, theirs = (f"{found[way] / 2**30:.1f} GiB" for way in ("comatch", "reference"))
        theirs += " (its fitted line; it did not fit)" if found["extrapolated"] else ""
        a_token = ", ".join(f"{way} {line['bytes_a_token'] / 1e6:.2f} MB a token" for way, line in row["fitted"].items() if line)
        yield Figure(f"{kind}, {found['tokens']:,} tokens; {a_token}", found["of_peaks"], ours, theirs, equal=_same(kind, row["agreed"]))


def gpu_attention_equal(record: Record) -> Iterator[Figure]:
    """Cosines of gpu-attention.json."""
    checks = {**record["right"], **{name: record[name]["agree"] for name in ("text", "tower") if name in record}}
    for case, row in checks.items():
        yield Figure(case, row["cosine"])


def gpu_attention_speed(record: Record) -> Iterator[Figure]:
    """Times of gpu-attention.json."""
    for part in ("text", "tower"):
        for way, row in record.get(part, {}).items():
            if isinstance(row, dict) and "ratios" in row:
                first = next(iter(row["seconds"]))
                for peer, found in row["ratios"].items():
                    rates = [sorted(row["seconds"][name])[len(row["seconds"][name]) // 2] for name in (first, peer)]
                    equal = f"cosine {record[part]['agree']['cosine']:.5f}"
                    yield _speed(f"{part}, {way}, {first} against {peer}", {"own_spread": row["own_spread"], **found}, rates, "s", equal)


def gpu_calls(record: Record) -> Iterator[Figure]:
    """Launches of gpu-attention.json."""
    if "tower" in record:
        found = record["tower"]["launches_per_layer"]
        yield Figure("vision tower of 32 layers, 4 pictures", found, f"{found:g}")


def gpu_ceilings(record: Record) -> Iterator[Figure]:
    """gpu-ceilings.json."""
    parts = record["parts"]
    if "matmul" in parts:
        yield Figure("bf16 matrix product, TFLOP/s", parts["matmul"]["flop_per_second"]["median"] / 1e12)
    for way, found in parts.get("copies", {}).get("bytes_per_second", {}).items():
        yield Figure(f"copy, {way}, GB/s", found["median"] / 1e9)


def gpu_whole(record: Record) -> Iterator[Figure]:
    """gpu-stage2-whole.json: one run, so no ratio."""
    for part, row in record["parts"].items():
        rates = row["pairs_per_second"]
        theirs = f"{rates['reference']:.3g} pairs/s" if "reference" in rates else ""
        yield Figure(f"{part}, {row['pairs']:,} pairs at once, one run", rates["memory"], f"{rates['memory']:.3g} pairs/s", theirs)


def _left_out(record: Record, parts: Sequence[str]) -> Iterator[Figure]:
    for part in parts:
        if part not in record["parts"] and part in record["left_out"]:
            yield Figure(part, None, missing=record["left_out"][part])
