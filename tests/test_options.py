"""Options that need or exclude one another: the tables are walked, and every option of every
command has been thought of."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from prepare_factory import source_of

from courier_fast.cli import COMMANDS, main
from courier_fast.data.prepare.layouts import Columns, generic
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.page_ids import PageIds, page_ids_of
from courier_fast.data.prepare.pages import page_bounds
from courier_fast.data.prepare.run import prepare
from courier_fast.data.read import truth
from courier_fast.data.read.likeness import items_note
from courier_fast.option_rules import RULES, SETTINGS, check_options, given
from courier_fast.sweep import grid
from courier_fast.train.config import Config

# What a command cannot do without, as the words of a command line.
REQUIRED = {
    "prepare": "out",
    "embed": "--run run --out e.npy",
    "export": "--out out",
    "evaluate": "--dataset ds",
    "report": "--dataset ds",
    "ctr": "--dataset ds --embeddings e.npy --out out",
    "sweep": "--out out",
    "index build": "--embeddings e.npy --out out",
    "index search": "--index index",
    "index clusters": "--embeddings e.npy --out out",
    "index codes": "--embeddings e.npy --out out",
}

ONE_OF = {
    "evaluate": [("--run", "--embeddings")],
    "report": [("--run", "--embeddings")],
    "embed": [("--dataset", "--images")],
}

# Options that always have an effect, or an error of their own where they have none.
ALWAYS = {
    "prepare": "layout images embeddings shrink shard-rows overwrite engine page-column page-size "
    "min-history max-history seed",
    "verify": "",
    "train": "",
    "embed": "run dataset images out dim dtype only-new compact engine batch device precision "
    "decoder threads",
    "export": "run out verify",
    "evaluate": "dataset run embeddings split baselines candidates k history score bootstrap seed "
    "json device",
    "report": "dataset run embeddings split baselines candidates k history score bootstrap seed "
    "json device out ctr sweep headline",
    "ctr": "dataset embeddings out models forms protocol seeds split history batch lr l2 "
    "no-control allow-missing threads proxies gate policy",
    "sweep": "out seeds split candidates k history score bootstrap batch device precision decoder "
    "threads",
    "index build": "embeddings out kind",
    "index search": "index item image k html json",
    "index clusters": "embeddings out like",
    "index codes": "embeddings out like",
    "quickstart": "out items users steps minutes short seed",
    "doctor": "check",
}
ALWAYS_SETTINGS = {
    "data": "dataset features pages images share history ahead buckets",
    "model": "dim compile slice shard ema",
    "loss": "recipe unit candidates memory prefixes reconstruction_weight prediction_weight "
    "sequence_weight impl",
    "optim": "epochs steps lr min_lr warmup weight_decay betas clip",
    "run": "out seed device precision save_steps save_minutes keep log_steps tensorboard progress",
}


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    name = command.split()[0]
    importlib.import_module(COMMANDS[name][0]).add_arguments(commands.add_parser(name))
    return parser


def leaves(command: str) -> dict[str, argparse.Action]:
    """The command's options."""
    parser = parser_of(command)
    for word in command.split():
        (sub,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = sub.choices[word]
    return {a.option_strings[-1]: a for a in parser._actions if a.option_strings}


def sample(action: argparse.Action, value: str) -> list[str]:
    """Words that give an option."""
    if action.nargs == 0:
        return [action.option_strings[-1]]
    value = value or (str(next(iter(action.choices))) if action.choices else "1")
    return [action.option_strings[-1], value]


def broken() -> Iterator[tuple[str, str, list[str]]]:
    for command, rules in RULES.items():
        actions = leaves(command)
        for number, rule in enumerate(rules):
            for option in rule.options:
                name, _, value = option.partition(" ")
                line = [*command.split(), *REQUIRED[command].split(), *rule.example]
                if name not in line:
                    line += sample(actions[name], value)
                for one, other in ONE_OF.get(command.split()[0], ()):
                    line += [] if {one, other} & set(line) else [one, "x"]
                yield f"{command}-{number}-{option}", option, line


@pytest.mark.parametrize(
    ("option", "line"), [pytest.param(o, line, id=name) for name, o, line in broken()]
)
def test_each_rule_gives_its_error(
    option: str, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = parser_of(" ".join(line[:1]))
    args = parser.parse_args(line)
    with pytest.raises(ValueError, match="has no effect with") as raised:
        check_options(parser, args, line)
    text = str(raised.value)
    assert text.count("\n") == 0
    assert text.count("--") >= 2 and option.split()[0] in text  # both are named


def test_every_option_of_every_command_is_in_the_table_or_has_always_an_effect() -> None:
    for command, rules in RULES.items():
        ruled = {o.split()[0] for rule in rules for o in rule.options}
        always = {f"--{o}" for o in ALWAYS[command].split()}
        found = {o for o in leaves(command) if o != "--help" and "." not in o}
        assert found == (ruled | always), command
    assert {c.split()[0] for c in RULES} == set(COMMANDS)


def test_every_setting_is_in_the_table_or_has_always_an_effect() -> None:
    ruled = {name for rule in SETTINGS for name in rule.options}
    always = {f"{s}.{n}" for s, names in ALWAYS_SETTINGS.items() for n in names.split()}
    assert {o[2:] for o in leaves("train") if "." in o} == ruled | always
    assert not ruled & always


@pytest.mark.parametrize(
    ("name", "example"),
    [pytest.param(n, r.example, id=f"{i}-{n}") for i, r in enumerate(SETTINGS) for n in r.options],
)
def test_each_setting_without_effect_gives_its_error(
    name: str, example: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    action = leaves("train")[f"--{name}"]
    default = getattr(
        getattr(Config.load(None, {"data.dataset": "ds"}), name.split(".")[0]), name.split(".")[1]
    )
    value = {
        "loss.heads": "1",
        "loss.attention": "mean",
        "loss.attention_scale": "1",
        "loss.attention_temperature": "1",
    }.get(name)
    if value is None:
        value = default if isinstance(default, str) else "1" if default is None else default
    values = [str(x) for x in value] if isinstance(value, tuple) else [str(value)]
    assert main(["train", "--data.dataset", "ds", *example, action.option_strings[0], *values]) == 2
    text = capsys.readouterr().err
    assert f"{name}: has no effect with" in text and text.count("\n") == 1


def test_settings_of_a_file_without_effect_are_errors_defaults_and_what_a_run_wrote_are_not(
    tmp_path: Path,
) -> None:
    def unused(text: str) -> dict[str, str]:
        (tmp_path / "c.toml").write_text(f'[data]\ndataset = "ds"\n{text}')
        return Config.load(tmp_path / "c.toml").unused()

    assert set(unused("[loss]\nmemory_after = 5")) == {"loss.memory_after"}
    assert not unused("[loss]\nmemory_after = 5\nmemory = 9")
    assert set(unused('features = "f.npy"\nsize = 64')) == {"data.size"}
    assert set(unused("[loss]\nsequence_weight = 0\nsequence_temperature = 0.3")) == {
        "loss.sequence_temperature"
    }
    assert not unused("[loss]\nsequence_weight = 0\nsequence_temperature = 0.2")
    config = Config.load(None, {"data.dataset": "ds", "data.features": "f.npy"})
    config.data.size, config.model.backbone, config.model.batch_norm = 96, "small_conv", False
    config.save(tmp_path / "kept.toml")
    assert not Config.load(tmp_path / "kept.toml").unused()


def test_a_sweep_takes_settings_that_have_an_effect_in_some_run(tmp_path: Path) -> None:
    given = {"data.dataset": ["ds"], "loss.memory": ["0", "64"], "loss.memory_after": ["5"]}
    assert len(grid(None, given, 1, tmp_path)) == 2
    with pytest.raises(ValueError, match="memory_after: has no effect without loss.memory"):
        grid(None, given | {"loss.memory": ["0"]}, 1, tmp_path)


def test_an_option_that_gives_its_default_is_given(tmp_path: Path) -> None:
    line = ["prepare", "out", "--interactions", "c.csv", "--clicked-column", "clicked"]
    assert given(parser_of("prepare"), line) >= {"interactions", "clicked_column"}
    assert "user_column" not in given(parser_of("prepare"), line)


def test_options_that_go_together_are_taken() -> None:
    for line in (
        "prepare out --interactions c.csv --page-column p --clicked-column c --keep-unclicked "
        "--page-size 4 --seed 1",
        "prepare out --interactions c.csv --items i.csv --negatives category --category-column "
        "kind --live-days 3 --repeats keep",
        "prepare out --layout movielens --source ml --min-rating 4 --negatives popularity --images "
        "p --shrink 64 --shard-bytes 9",
        "prepare out --layout ebnerd --source e --keep-unclicked --validation-from 2020-01-01 "
        "--test-from 2020-01-02",
        "prepare out --layout hm --source e --negatives category --threads 2 --memory-gib 1",
        "embed --run r --dataset ds --out e --only-new --since 2020-01-01",
        "evaluate --dataset ds --embeddings e.npy --backbone resnet18 --pretrained --size 64 "
        "--batch 8 --candidates popular --count 9",
        "evaluate --dataset ds --run r --baselines random --batch 8 --threads 2",
        "ctr --dataset ds --embeddings e.npy --out o --protocol shared "
        "disjoint --encoder-share 0.4",
        "export --run r --out o --licence x --dataset ds --photos 9 --verify --vectors v.npy",
        "index search --index i --image a.jpg --encoder r --dataset ds --html p.html",
        "index clusters --embeddings e --out o --dataset ds --until 2020-01-01 --k 9",
        "index codes --embeddings e --out o --dataset ds --until 2020-01-01 --levels 2",
        "sweep --out o --candidates sampled --count 5",
    ):
        words = line.split()
        parser = parser_of(words[0])
        check_options(parser, parser.parse_args(words), words)


# ---- words for yes and no ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        pl.Series([" True ", "F", "YES", "n", "On", "off", "1", "0.0", "1e0"]),
        pl.Series([1, 0, 1, 0, 1, 0, 1, 0, 1]),
        pl.Series([1, 0, 1, 0, 1, 0, 1, 0, 1], dtype=pl.Decimal(9, 2)),
        pl.Series([1.0, 0.0, 1.0, -0.0, 1.0, 0.0, 1.0, 0.0, 1.0]),
        pl.Series([True, False] * 4 + [True]),
        pl.Series(["y", "N"] * 4 + ["t"], dtype=pl.Categorical),
    ],
)
def test_yes_and_no_are_read_in_every_usual_form(values: pl.Series) -> None:
    assert truth.can_be_read(values.dtype)
    assert truth.read(values.cast(pl.String)).to_list() == [True, False] * 4 + [True]


def test_what_is_missing_is_neither_yes_nor_no() -> None:
    words = ["", "  ", "NULL", "None", "nan", "\\N", None, "1"]
    assert truth.read(pl.Series(words)).to_list() == [None] * 7 + [True]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["1", "maybe", "maybe", "x", "0"], "got 'maybe' in 2, 'x' in 1 of 5 rows"),
        (["3", "1", "2", "4", "5"], "got '2' in 1, '3' in 1, '4' in 1 and 1 more of 5 rows"),
        (["-1", "1"], "got '-1' in 1 of 2"),
        (["0.5", "1"], "got '0.5' in 1 of 2"),
        (["inf", "2020-01-01"], "'2020-01-01' in 1, 'inf' in 1 of 2"),
    ],
)
def test_a_word_that_nobody_knows_was_no_click(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match="clicked-column: expected yes or no") as raised:
        truth.read(pl.Series(words))
    assert said in str(raised.value)


def shown(
    tmp_path: Path, lines: list[str], head: str = "page,user_id,item_id,timestamp,clicked"
) -> Path:
    path = tmp_path / "shown.csv"
    path.write_text("\n".join([head, *lines]) + "\n")
    return path


def test_unknown_and_missing_words_of_clicks_through_prepare(tmp_path: Path) -> None:
    lines = [
        f"p{n},u{n % 3},i{n * 7 % 5 + k},{1_600_000_000 + 86_400 * n},{'yes' if k == 0 else 'NULL'}"
        for n in range(30)
        for k in range(3)
    ]
    options = PrepareOptions(min_history=1)
    report = prepare(
        tmp_path / "out",
        source=generic([shown(tmp_path, lines)], None, Columns(page="page")),
        options=options,
    )
    assert report["impressions"][truth.UNKNOWN] == 60
    assert not report["impressions"]["dropped"]
    lines[4] = lines[4].replace("NULL", "perhaps")
    source = generic([shown(tmp_path, lines)], None, Columns(page="page"))
    with pytest.raises(ValueError, match="got 'perhaps' in 1 of 90 rows"):
        prepare(tmp_path / "bad", source=source, options=options)
    dates = tmp_path / "d.parquet"
    pl.DataFrame(
        {
            "page": ["a"],
            "user_id": ["b"],
            "item_id": ["c"],
            "timestamp": [1_600_000_000],
            "clicked": pl.Series([0]).cast(pl.Date),
        }
    ).write_parquet(dates)
    with pytest.raises(
        ValueError,
        match="d.parquet: expected yes or no in the column clicked, got a column of Date",
    ):
        generic([dates], None, Columns(page="page"))


@pytest.mark.parametrize("name", ["clicked", "is_click", "Label", "CLICK"])
@pytest.mark.parametrize("words", [("1", "0"), ("True", "False"), ("yes", "no")])
def test_a_column_that_says_what_was_clicked_was_passed_over(
    tmp_path: Path, name: str, words: tuple[str, str]
) -> None:
    lines = [f"u,i{n},{1_600_000_000 + n},{words[n % 4 > 0]}" for n in range(8)]
    path = shown(tmp_path, lines, f"user_id,item_id,timestamp,{name}")
    (note,) = generic([path]).notes
    assert f"the column {name} says no in 6 of the first 8 rows" in note
    assert f"--page-column ID --clicked-column {name}" in note


@pytest.mark.parametrize("words", [["1", "1"], ["3", "5"], ["spam", "0"]])
def test_a_column_that_says_something_else_is_no_matter(tmp_path: Path, words: list[str]) -> None:
    lines = [f"u,i{n},{1_600_000_000 + n},{word}" for n, word in enumerate(words)]
    assert not generic([shown(tmp_path, lines, "user_id,item_id,timestamp,label")]).notes


# ---- items and page ids --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["100", "101"], "do they differ in leading zeros (000100 and 100)?"),
        (["000100.jpg", "x"], "in a suffix as files have it (000100 and 000100.jpg)"),
        (["000100.0"], "in a decimal point (000100 and 000100.0)"),
        (["a/000100"], "in folders before them"),
        (["other", "shop"], "its rows are other, shop"),
        ([], "its rows are none"),
    ],
)
def test_a_table_of_items_that_fits_none_was_no_matter(rows: list[str], said: str) -> None:
    ids = pl.Series("item_id", [f"{n:06}" for n in range(100, 110)])
    table = pl.LazyFrame({"item_id": pl.Series(rows, dtype=pl.String)})
    with pytest.raises(
        ValueError, match="items: 0 of 10 items of the interactions match"
    ) as raised:
        items_note(ids, ids[:0], table)
    assert said in str(raised.value)


def test_a_table_of_items_that_fits_few_is_noted() -> None:
    ids = pl.Series("item_id", [f"{n:06}" for n in range(100, 110)])
    table = pl.LazyFrame({"item_id": [*ids[:4], "104"]})
    (note,) = items_note(ids, ids[:4], table)
    assert "4 of 10 items" in note and "leading zeros (000104 and 104)" in note
    assert not items_note(ids, ids[:5], table)


def test_negatives_of_a_category_need_one(tmp_path: Path) -> None:
    events = [(f"u{n % 3}", f"i{n % 5}", 60 * n) for n in range(60)]
    options = PrepareOptions(min_history=1, negatives="category")
    with pytest.raises(
        ValueError, match="negatives: category expects items with a category, got none of 5"
    ):
        prepare(tmp_path / "out", source=source_of(events), options=options)


def rows_shown(pages: list[tuple[int, int, int]]) -> PageIds:
    """Of (user, page, time), sorted."""
    user, page, time = (np.array(c) for c in zip(*pages, strict=True))
    rows = {"user": user, "page": page.astype(np.uint64), "time": time}
    return page_ids_of(rows, page_bounds(rows))


def test_page_ids_that_are_used_again_were_one_page() -> None:
    day = 86_400
    pages = [
        (0, 1, 0),
        (0, 1, day),
        (0, 2, 0),
        (0, 2, 20 * day),
        (1, 1, 5),
        (1, 3, 0),
        (2, 1, 3),
        (2, 3, 9),
        (2, 9, 0),
        (2, 9, day + 1),
    ]
    whole = rows_shown(pages)
    assert whole.counts() == {"apart": 2, "looked_at": 4, "of_several_users": 2}
    apart, several = whole.notes(lambda user: f"u{user}", 7)
    assert "2 of 7 pages" in apart and "user u0: from 1970-01-01 00:00:00 to 1970-01-21" in apart
    assert "2 of 4 page ids looked at belong to several users (u0 and u1" in several
    for cut in (4, 6):  # parts, of users counted from 0
        first, rest = pages[:cut], [(u - 1 - (cut == 6), p, t) for u, p, t in pages[cut:]]
        parts = rows_shown(first) + rows_shown(rest).moved(1 + (cut == 6))
        assert parts.counts() == whole.counts()
        assert parts.notes(str, 7) == whole.notes(str, 7)
    assert not rows_shown([(0, 1, 0), (0, 2, 9)]).notes(str, 2)
    assert PageIds().counts() is None and not PageIds().notes(str, 0)


def test_page_ids_used_again_are_in_the_log_and_the_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        f"{n % 4},u{n % 3},i{n * 7 % 5 + k},{1_600_000_000 + 86_400 * n},{int(k == 0)}"
        for n in range(40)
        for k in range(3)
    ]
    source = generic([shown(tmp_path, lines)], None, Columns(page="page"))
    report = prepare(tmp_path / "out", source=source, options=PrepareOptions(min_history=1))
    assert report["pages"]["page_ids"] == {"apart": 12, "looked_at": 4, "of_several_users": 4}
    assert len(report["notes"]) == 2
    assert [m for m in caplog.messages if m.startswith("--page-column: ")] == report["notes"]


def test_the_documentation_has_every_option_of_the_tables() -> None:
    docs = Path(__file__).parent.parent / "docs"
    text = "".join((docs / f"{name}.md").read_text() for name in ("data", "evaluation", "training"))
    for rules in RULES.values():
        for option in (o for rule in rules for o in rule.options):
            assert f"`{option}`" in text or option.endswith("-column"), option
