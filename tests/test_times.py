"""What is read as a time, and what is refused: by the form of a column and its span."""

from __future__ import annotations

from datetime import date, datetime, timedelta, timezone
from datetime import time as clock
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from prepare_factory import page_rows

from courier_fast.data.dataset import Dataset
from courier_fast.data.prepare import steps
from courier_fast.data.prepare.layouts import Columns, Source, generic
from courier_fast.data.prepare.options import PrepareOptions, microseconds
from courier_fast.data.prepare.rows import time_columns
from courier_fast.data.prepare.run import prepare
from courier_fast.data.read.time_forms import time_form
from courier_fast.data.read.times import read_dates
from courier_fast.data.tables import write_shards

EPOCH = datetime(1970, 1, 1)
NOON = 1_600_000_000  # 2020-09-13 12:26:40
END = datetime(2020, 1, 31, 23, 59, 59)


def micro(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2020-01-31", datetime(2020, 1, 31)),
        ("2020/01/31", datetime(2020, 1, 31)),
        ("2020-1-5 3:04", datetime(2020, 1, 5, 3, 4)),
        ("2020-01-31T23:59", END.replace(second=0)),
        ("2020-01-31T23", END.replace(minute=0, second=0)),
        ("2020-01-31T23:59:59", END),
        ("2020-01-31 23:59:59", END),
        ("2020-01-31t23:59:59z", END),
        ("2020-01-31 23:59:59Z", END),
        ("2020-01-31 23:59:59.5", END.replace(microsecond=500_000)),
        ("2020-01-31T23:59:59,123", END.replace(microsecond=123_000)),
        ("2020-01-31T23:59:59.123456789Z", END.replace(microsecond=123_456)),
        ("2020-01-31T23:59:59+01", END - timedelta(hours=1)),
        ("2020-01-31T23:59:59+0100", END - timedelta(hours=1)),
        ("2020-01-31T23:59:59.25 -05:30", END + timedelta(hours=5, minutes=30, milliseconds=250)),
        ("2020-01-31T23:59:59+01:00[Europe/Paris]", END - timedelta(hours=1)),
        ("2020-01-31 23:59:59.123+00", END.replace(microsecond=123_000)),
        ("2020-01-31 23:59:59 UTC", END),
        ("20200131T235959Z", END),
        ("20200131T2359+0200", END.replace(second=0) - timedelta(hours=2)),
        ("20200131 23:59:59", END),
        ("Fri, 31 Jan 2020 23:59:59 +0100", END - timedelta(hours=1)),
        ("Fri, 31 Jan 2020 23:59:59 GMT", END),
        ("31 Jan 2020 23:59:59 EST", END + timedelta(hours=5)),
        ("2020-01-31T24:00:00", datetime(2020, 2, 1)),
        ("2020-02-30", None),
        ("2020-13-01", None),
        ("2020-01-31T25:00:00", None),
        ("01/02/2020", None),
        ("31.12.2019", None),
        ("yesterday", None),
        ("2020", None),
    ],
)
def test_dates_are_read_in_every_form(text: str, moment: datetime | None) -> None:
    expected = None if moment is None else micro(moment)
    assert read_dates(pl.Series([text])).to_list() == [expected]
    # Among others, whatever stands first.
    mixed = read_dates(pl.Series(["2020-01-01 00:00:00", None, text, "2020-01-01"]))
    assert mixed.to_list() == [
        micro(datetime(2020, 1, 1)),
        None,
        expected,
        micro(datetime(2020, 1, 1)),
    ]


def read(values: Any, form: str | None = None, **how: Any) -> tuple[str, list[int | None]]:
    """What a column is, and its times in microseconds."""
    column = values if isinstance(values, pl.Series) else pl.Series(values)
    found = time_form(column.alias("t").to_frame().lazy(), "t", "c.csv", form, **how)
    split = found.split(column).struct.unnest()
    parts = split["microsecond"]
    assert found.parts == bool((parts.fill_null(0) != 0).any())
    return found.name, (split["time"] * 1_000_000 + parts).to_list()


M = 1_000_000


@pytest.mark.parametrize(
    ("values", "name", "times"),
    [
        ([NOON, NOON + 1], "seconds", [NOON * M, NOON * M + M]),
        ([str(NOON), f" {NOON + 1}"], "seconds", [NOON * M, NOON * M + M]),
        ([NOON * 1000 + 400], "milliseconds", [NOON * M + 400_000]),
        ([float(NOON * 1000), None], "milliseconds", [NOON * M, None]),
        ([NOON * M + 7], "microseconds", [NOON * M + 7]),
        # Through float64 this would be off by 100 ns, and a microsecond.
        ([NOON * 1000 * M + 8_999], "nanoseconds", [NOON * M + 8]),
        (["1.6e9", "1600000000.25"], "seconds", [NOON * M, NOON * M + 250_000]),
        ([float(NOON), float("nan")], "seconds", [NOON * M, None]),
        ([Decimal("1600000000.500000")], "seconds", [NOON * M + 500_000]),
        ([Decimal(NOON * 1000 * M + 8_999)], "nanoseconds", [NOON * M + 8]),
        (pl.Series([NOON], dtype=pl.UInt32), "seconds", [NOON * M]),
        (pl.Series([f"{NOON}"], dtype=pl.Categorical), "seconds", [NOON * M]),
        ([20200131], "YYYYMMDD", [micro(datetime(2020, 1, 31))]),
        ([20200131.0, None], "YYYYMMDD", [micro(datetime(2020, 1, 31)), None]),
        (["202001312359"], "YYYYMMDDhhmm", [micro(END.replace(second=0))]),
        ([20200131235959], "YYYYMMDDhhmmss", [micro(END)]),
        (["20200131235959123"], "YYYYMMDDhhmmssfff", [micro(END) + 123_000]),
        (
            [43831.0, 43831.75],
            "days",
            [micro(datetime(2020, 1, 1)), micro(datetime(2020, 1, 1, 18))],
        ),
        (["43831.5000115741"], "days", [micro(datetime(2020, 1, 1, 12, 0, 1))]),
        ([date(2020, 1, 31)], "dates", [micro(datetime(2020, 1, 31))]),
        (
            [datetime(2020, 1, 31, 1, tzinfo=timezone(timedelta(hours=1)))],
            "dates",
            [micro(datetime(2020, 1, 31))],
        ),
        (
            ["2020-01-31", "NULL", "\\N", ""],
            "dates",
            [micro(datetime(2020, 1, 31)), None, None, None],
        ),
        # What stands for "unknown" among good ones is no time.
        ([0, -1, NOON, NOON, NOON], "seconds", [None, None] + [NOON * M] * 3),
        (
            ["1970-01-01", "9999-12-31 23:59:59", "2020-01-31", "2020-01-31"],
            "dates",
            [None, None] + [micro(datetime(2020, 1, 31))] * 2,
        ),
        ([20201399, 20200131], "YYYYMMDD", [None, micro(datetime(2020, 1, 31))]),
        (["never", "2020-01-31"], "dates", [None, micro(datetime(2020, 1, 31))]),
        ([None, None], "dates", [None, None]),
    ],
)
def test_a_column_is_told_by_its_span(values: Any, name: str, times: list[int | None]) -> None:
    assert read(values) == (name, times)


@pytest.mark.parametrize(
    ("values", "form", "named"),
    [
        ([5, 6, 7], None, "5, 7, 6: as seconds since 1970 they are 1970-01-01"),
        ([NOON, NOON * 1000], None, "1600000000, 1600000000000: milliseconds and seconds in one"),
        ([4 * NOON] * 3, None, "they are 2172-"),
        ([-5, NOON], None, "-5, 1600000000"),
        ([0, 0, 0, NOON], None, "3 of 4 values cannot be read"),
        (["01/02/2020"] * 3, None, "'01/02/2020': day or month first is not guessed"),
        (["2020-01-01"] * 9 + ["31.12.2019"], None, "'31.12.2019', '2020-01-01': day or month"),
        ([str(NOON), "2020-01-31"], None, "'1600000000', '2020-01-31': numbers and dates"),
        (["1985-01-01", "2020-01-01"], None, "from 1985-01-01 to 2020-01-01"),
        (["2020-01-01", "2099-01-01"], None, "from 2020-01-01 to 2099-01-01"),
        ([datetime(1970, 1, 19, 6)], None, "from 1970-01-19"),
        (["a", "b", "c", "2020-01-01"], None, "'a', '2020-01-01', 'b': 3 of 4 values"),
        ([NOON], "milliseconds", "as milliseconds they are 1970-01-19"),
        ([NOON * 1000], "seconds", "as seconds they are beyond the year 9999"),
        (["2020-01-31"], "seconds", "1 of 1 values cannot be read"),
        (["2020-01-31"], "%d/%m/%Y", "1 of 1 values cannot be read"),
        ([14102100], None, "14102100: as seconds since 1970"),
    ],
)
def test_what_no_one_can_know_is_refused(values: list[Any], form: str | None, named: str) -> None:
    with pytest.raises(ValueError, match=r"^c.csv: t: expected times .*--time-format") as caught:
        read(values, form)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[True], [clock(1)], [timedelta(1)], [[NOON]]])
def test_types_that_hold_no_times_are_refused(values: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"c.csv: t: expected dates, or numbers since 1970, got a"):
        read(values)


@pytest.mark.parametrize(
    ("values", "form", "times"),
    [
        ([NOON], "seconds", [NOON * M]),
        ([5, 6, 0], "order", [5 * M, 6 * M, 0]),
        (["5.5"], "order", [5_500_000]),
        ([43831.5], "days", [micro(datetime(2020, 1, 1, 12))]),
        ([42369], "days-1904", [micro(datetime(2020, 1, 1))]),
        (["31/01/2020", "x"], "%d/%m/%Y", [micro(datetime(2020, 1, 31)), None]),
        (["01/31/2020 11:59 PM"], "%m/%d/%Y %I:%M %p", [micro(END.replace(second=0))]),
        (["Fri Jan 31 23:59:59 +0100 2020"], "%a %b %d %H:%M:%S %z %Y", [micro(END) - 3600 * M]),
        (["31.01.2020 23:59:59.5"], "%d.%m.%Y %H:%M:%S.%f", [micro(END) + 500_000]),
        ([14102100], "%y%m%d%H", [micro(datetime(2014, 10, 21))]),
        ([datetime(2020, 1, 31)], "milliseconds", [micro(datetime(2020, 1, 31))]),
    ],
)
def test_the_user_says_what_times_are(values: Any, form: str, times: list[int | None]) -> None:
    assert read(values, form)[1] == times


def test_when_an_item_is_on_offer_may_be_any_date() -> None:
    never = micro(datetime(9999, 12, 31))
    assert read(["1950-05-01", "9999-12-31"], any_date=True)[1][1] == never
    assert read([20200131, 99991231], any_date=True)[1] == [micro(datetime(2020, 1, 31)), never]
    assert read([4_000_000_000], any_date=True) == ("seconds", [4_000_000_000 * M])


@pytest.mark.parametrize("form", ["%d/%m/%Y", "seconds", None])
@pytest.mark.parametrize("since", ["31/12/2019", "2019-12-31"])
def test_the_format_of_times_was_not_tried_on_the_items(
    tmp_path: Path, form: str | None, since: str
) -> None:
    time = "05/01/2020" if form == "%d/%m/%Y" else 1_577_836_800
    (tmp_path / "c.csv").write_text(f"user_id,item_id,timestamp\n1,2,{time}\n")
    (tmp_path / "i.csv").write_text(f"item_id,first_seen\n2,{since}\n")
    paths = [tmp_path / "c.csv"], tmp_path / "i.csv"
    if "/" in since and form != "%d/%m/%Y":
        with pytest.raises(ValueError, match=r"i.csv: first_seen: expected dates, .*--time-format"):
            generic(*paths, Columns(time_format=form))
        return
    items = generic(*paths, Columns(time_format=form)).items
    assert items is not None
    assert items.collect()["first_seen"].to_list() == [1_577_750_400]  # 2019-12-31


def test_formats_and_dates_of_options_are_checked() -> None:
    with pytest.raises(ValueError, match="time_format: expected seconds, .* got 'iso'"):
        Columns(time_format="iso")
    for text in ("2020-01-31T23:59:59", "20200131235959", "Fri, 31 Jan 2020 23:59:59 GMT"):
        assert microseconds("test_from", text) == micro(END)
    with pytest.raises(ValueError, match="test_from: expected a date"):
        PrepareOptions(validation_from="2020-01-01", test_from="31/01/2020")


def clicks(step: float) -> list[tuple[str, str, float]]:
    rng = np.random.default_rng(3)
    times = rng.permutation(120) * step
    return [(f"u{rng.integers(4)}", f"{rng.integers(30):03}", t) for t in times.tolist()]


def written(folder: Path, rows: list[tuple[str, str, float]], scale: int) -> Path:
    folder.mkdir()
    path = folder / "own.csv"
    lines = [f"{u},{i},{round((NOON + t) * scale)}" for u, i, t in rows]
    path.write_text("\n".join(["user_id,item_id,timestamp", *lines]))
    return path


def test_parts_of_a_second_were_cut_off(tmp_path: Path) -> None:
    """Clicks 0.4 s apart, in milliseconds, are in the same order, histories and splits as 1 s
    apart; pages know when they were."""
    options, found, rows = PrepareOptions(min_history=1, negatives="popularity"), [], []
    for name, step, scale in (("s", 1.0, 1), ("ms", 0.4, 1000)):
        path = written(tmp_path / name, clicks(step), scale)
        prepare(tmp_path / name / "out", source=generic([path]), options=options)
        found.append(Dataset(tmp_path / name / "out"))
        rows.append(
            [
                (r["user"], [i for i, _ in r["history"]], r["items"], r["clicked"])
                for r in page_rows(found[-1])
            ]
        )
    whole, fine = found
    # Which items are on offer when is the same, so pages are too.
    assert rows[0] == rows[1] and len(rows[0]) > 60
    assert whole.info["splits"] == fine.info["splits"]
    assert "microsecond" not in whole.pages.schema.names + whole.events.schema.names
    np.testing.assert_allclose((fine.page_moment - NOON) / 0.4, whole.page_moment - NOON, atol=1e-5)
    assert (fine.page_time == np.floor(fine.page_moment)).all()
    assert (np.diff(fine.page_moment) > 0).all()
    last = fine.event_moment[fine.history_end - 1]
    assert (last < fine.page_moment).all() and (
        fine.event_time[fine.history_end - 1] == fine.page_time
    ).any()
    cut = fine.first_pages(0.3)
    assert len(cut) == len(whole.first_pages(0.3))


def test_seconds_beside_timestamps_were_1970(tmp_path: Path) -> None:
    """A file of seconds and one of timestamps are each read as what they are."""
    folder = tmp_path / "two"
    folder.mkdir()
    moment = pl.Series([datetime(2020, 9, 13, 12, 26, 45)])
    for name, times in (("0", pl.Series([NOON])), ("1", moment)):
        frame = pl.DataFrame({"user_id": [1], "item_id": [2], "timestamp": times})
        frame.write_parquet(folder / f"{name}.parquet")
    source = generic(sorted(folder.iterdir()))
    assert source.events is not None
    assert source.events.collect()["time"].to_list() == [NOON, NOON + 5]


def test_unreadable_times_of_items_are_counted(tmp_path: Path) -> None:
    path, about = written(tmp_path / "a", clicks(1), 1), tmp_path / "items.csv"
    about.write_text(
        "item_id,first_seen,last_seen\n000,2020-01-01,soon\n001,2020-01-02,9999-12-31\n002,,2021-01-01\n"
    )
    report = prepare(
        tmp_path / "out", source=generic([path], about), options=PrepareOptions(min_history=1)
    )
    assert report["items_times_unreadable"] == {"last_seen": 1}


def test_both_engines_write_the_same_times(tmp_path: Path) -> None:
    """Rows with parts of a second, as the steps of Ray read and write them and as the local engine
    does."""
    time, part = [NOON, NOON - 1, None], [400_000, 0, 5]
    frame = pl.LazyFrame(
        {
            "user_id": list("aba"),
            "item_id": list("xyx"),
            "time": time,
            "microsecond": pl.Series(part, dtype=pl.Int32),
        }
    )
    source = Source("test", events=frame)
    assert source.ticks == M
    rows, _, about = steps.read([frame], "events", source, 0, 10, source.ticks)
    ticks = rows["time"]
    assert ticks.tolist() == [NOON * M + 400_000, (NOON - 1) * M]
    assert about["counts"]["time missing or unreadable"] == 1
    columns = {"item": rows["item"], "time": ticks}
    names = ["item", "time", "microsecond"]
    ours = steps.write_rows(tmp_path / "a", "events", names, [(0, 0, 2)], [0], [0], columns)
    assert ours == write_shards(
        tmp_path / "b", "events", {"item": rows["item"], **time_columns(ticks, M)}
    )
