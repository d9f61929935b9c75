import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest.duplicates import Seen
from pipeline.ingest.expression import Filter
from pipeline.ingest.metadata import describe_files
from pipeline.ingest.recipe import load
from pipeline.ingest.select import select
from pipeline.ingest.web_recipe import WebRecipe
from pipeline.ingest.work_lists import Plan, list_path, read_plan

COLUMNS = {"a": [1, 2, None, 4, 5], "b": [5.0, 4.0, 3.0, 2.0, 1.0], "s": ["x", "y", "x", None, "zz"]}


def recipe(**changes: Any) -> WebRecipe:
    return WebRecipe(metadata="ask someone", license="none", **changes)


def metadata(path: Path, rows: int, **columns: Any) -> Path:
    table = {
        "url": [f"https://example.com/{i}.jpg" for i in range(rows)],
        "caption": [f"picture {i}" for i in range(rows)],
        "number": list(range(rows)),
    }
    pq.write_table(pa.table(table | columns), path, row_group_size=max(rows // 3, 1))
    return path


def selected(folder: Path) -> tuple[Plan, list[dict[str, Any]]]:
    plan = read_plan(folder)
    assert plan is not None
    tables = [pq.ParquetFile(list_path(folder, list_id)).read() for list_id in plan.lists]
    return plan, [row for table in tables for row in table.to_pylist()]


# Filters


def kept(text: str) -> list[int]:
    table: Any = pa.table(COLUMNS | {"i": range(5)})
    found = Filter(text)
    return table.filter(found.bind(table.schema, {name: name for name in found.names}))["i"].to_pylist()


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a > 1", [1, 3, 4]),
        ("a > 1 and b < 4", [3, 4]),
        ("a > 4 or s == 'x'", [0, 2, 4]),
        ("not a > 1", [0]),
        ("1 < a <= 4", [1, 3]),
        ("s in ('x', 'zz')", [0, 2, 4]),
        ("s not in ['x', 'zz'] and s is not None", [1]),
        ("a is None", [2]),
        ("max(a, b) <= 3 * min(a, b)", [1, 2, 3]),
        ("length(s) == 2", [4]),
        ("a + 1 - b * 2 / 4 >= -1 and a < 2", [0]),
        ("a != 1", [1, 3, 4]),
    ],
)
def test_a_filter_means_what_it_says_and_a_missing_value_is_not_true(text: str, rows: list[int]) -> None:
    assert kept(text) == rows


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1))
def test_a_filter_agrees_with_python(pairs: list[tuple[int, int]]) -> None:
    text = "a * 2 < b + 1 and not (a == b or b in (0, 2)) or max(a, b) == 3"
    table: Any = pa.table({"a": [a for a, _ in pairs], "b": [b for _, b in pairs]})
    bound = Filter(text).bind(table.schema, {"a": "a", "b": "b"})
    expected = [(a, b) for a, b in pairs if (a * 2 < b + 1 and not (a == b or b in (0, 2))) or max(a, b) == 3]
    assert [tuple(row.values()) for row in table.filter(bound).to_pylist()] == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a >", "cannot be read"),
        ("__import__('os').system('true')", "is not understood"),
        ("a.b > 1", '"a.b" is not understood'),
        ("open('x')", "is not understood"),
        ("(lambda: 1)() == a", "is not understood"),
        ("a in b", '"b" is not understood'),
        ("a[0] == 1", '"a[0]" is not understood'),
        ("a ** 9 > 1", "is not understood"),
        ("a == b'x'", "is not understood"),
        ("1 == 1", "looks at no column"),
        ("(" * 300 + "a" + ")" * 300, "cannot be read"),
        ("a == 1 " * 2000, "the limit is 10,000"),
    ],
)
def test_a_filter_that_is_none_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="filter") as caught:
        Filter(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_filter_that_does_not_fit_the_types_is_refused() -> None:
    with pytest.raises(ValueError, match=r'filter "s > 1" does not fit the columns \(s: string\)'):
        kept("s > 1")


# Duplicates


def test_seen_agrees_with_a_set() -> None:
    rng = random.Random(1)
    pool = ["".join(rng.choice("ab\0é") for _ in range(rng.randint(0, 20))) for _ in range(3000)] + ["x" * 9000]
    strings = [rng.choice(pool) for _ in range(8000)]
    seen, known, got, expected = Seen(1 << 16), set[str](), list[bool](), list[bool]()
    for start in range(0, len(strings), 700):
        got += seen.repeated(pa.array(strings[start : start + 700])).tolist()
    for string in strings:
        expected.append(string in known)
        known.add(string)
    assert got == expected


def test_seen_tells_strings_apart_that_differ_in_one_byte() -> None:
    base = b"https://example.com/a/long/enough/path/of/some/bytes.jpg"
    strings = [base[:i] + bytes([byte]) + base[i + 1 :] for i in range(len(base)) for byte in range(1, 128)]
    pairs = [strings[i] + strings[-i] for i in range(1, len(strings))]
    unique = sorted({*strings, *pairs})
    assert not Seen(1 << 20).repeated(pa.array([item.decode() for item in unique])).any()


def test_seen_forgets_when_it_is_full_and_never_takes_a_new_string_for_an_old_one() -> None:
    seen = Seen(1 << 10)
    for start in range(0, 20_000, 100):
        assert not seen.repeated(pa.array([str(i) for i in range(start, start + 100)])).any()
    again = seen.repeated(pa.array([str(i) for i in range(19_900, 20_000)]))
    assert again.mean() > 0.9


@pytest.mark.parametrize(("share", "missed"), [(0.3, 0.002), (0.6, 0.03), (0.9, 0.12)])
def test_seen_misses_few_repetitions_while_it_fills(share: float, missed: float) -> None:
    """Poisson's 0.04, 2 and 10 % of buckets that overflow, and some spread of so small a table."""
    capacity = 1 << 14
    seen, strings = Seen(capacity), pa.array([f"http://a/{i}" for i in range(int(share * capacity))])
    assert not seen.repeated(strings).any()
    # Asked in one go: what is found missing is remembered after.
    assert 1 - seen.repeated(strings).mean() < missed


# Rows


def test_every_row_is_in_one_list_in_order_or_counted_as_filtered_out(tmp_path: Path) -> None:
    files = [metadata(tmp_path / "1.parquet", 250), metadata(tmp_path / "2.parquet", 100, number=[500] * 100)]
    plan = select(recipe(filter="number >= 60", save=("number",), samples_per_shard=70, duplicates="keep"), files,
                  tmp_path)  # fmt: skip
    assert (plan.rows_read, plan.rows, plan.filtered_out, plan.num_lists) == (350, 290, 60, 5)
    read, rows = selected(tmp_path)
    assert read == plan
    assert [row["row"] for row in rows] == list(range(60, 350))
    assert [row["number"] for row in rows] == [*range(60, 250), *[500] * 100]
    lengths = [pq.read_metadata(list_path(tmp_path, i)).num_rows for i in plan.lists]
    assert lengths == [70, 70, 70, 70, 10]


def test_a_subset_is_the_first_rows_that_pass(tmp_path: Path) -> None:
    plan = select(recipe(filter="number >= 5", rows=20), [metadata(tmp_path / "m.parquet", 100)], tmp_path)
    _, rows = selected(tmp_path)
    assert [row["row"] for row in rows] == list(range(5, 25))
    assert (plan.rows, plan.filtered_out) == (20, 5)


def test_useless_rows_stand_in_the_lists_with_their_status(tmp_path: Path) -> None:
    captions = [b"fine", None, b"", b" \t\n", b"\xff\xfe", b"x" * 9000, b"fine", b"fine", b"fine", b"twice"]
    urls = ["http://a/1", "http://a/2", "http://a/3", "http://a/4", "http://a/5", "http://a/6", None, "a/7",
            "file:///a", "HTTP://a/9"]  # fmt: skip
    raw = pa.array([*captions, b"again", b"good"], pa.binary())
    table = pa.table({"url": [*urls, "http://a/1", "http://a/2"], "caption": raw.cast(pa.string(), safe=False)})
    pq.write_table(table, tmp_path / "m.parquet")
    plan = select(recipe(), [tmp_path / "m.parquet"], tmp_path)
    _, rows = selected(tmp_path)
    # The last row is not a duplicate: the row before it with its URL has no caption and is not asked for.
    assert [row["status"] for row in rows] == [
        None, "no caption", "no caption", "no caption", "caption not UTF-8", "caption too long", "bad url", "bad url",
        "scheme", None, "duplicate url", None,
    ]  # fmt: skip
    assert plan.statuses == {
        "bad url": 2, "scheme": 1, "no caption": 3, "caption not UTF-8": 1, "caption too long": 1, "duplicate url": 1
    }  # fmt: skip
    assert rows[4]["caption"] == "\ufffd\ufffd"


def test_columns_are_found_by_any_of_their_names(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"URL": ["http://a/1"], "TEXT": ["t"], "WIDTH": [5.0]}), path)
    names = {"url": ("link", "URL"), "caption": ("TEXT",), "wide": ("WIDTH",)}
    select(recipe(columns=names, filter="wide > 1", save=("wide",)), [path], tmp_path)
    assert selected(tmp_path)[1] == [{"row": 0, "url": "http://a/1", "caption": "t", "wide": 5.0, "status": None}]


SCORES = {"similarity": [0.35, 0.1], "punsafe": [0.1, 0.1], "pwatermark": [0.2, 0.2]}
DATACOMP = {
    "uid": ["a", "b"], "text": ["some words", "x"], "original_width": [300, 300], "original_height": [200, 200],
    "clip_l14_similarity_score": [0.3, 0.2], "sha256": ["00", "11"], "face_bboxes": [[], [[0.1, 0.1, 0.2, 0.2]]],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "columns", "taken"),
    [
        ("laion400m", {"url": None, "caption": ["t", "u"], "NSFW": ["UNLIKELY"] * 2, **SCORES}, 1),
        ("laion400m", {"URL": None, "TEXT": ["t", "u"], "NSFW": ["UNLIKELY"] * 2, **SCORES}, 1),
        ("laion2b-en", {"url": None, "caption": ["t", "u"], "width": [9, 9], "key": ["0", "1"], **SCORES}, 1),
        ("datacomp-1b", {"url": None, **DATACOMP}, 2),
        ("datacomp-small", {"url": None, **DATACOMP}, 1),
        (
            "coyo-700m",
            {"url": None, "text": ["t", "u"], "clip_similarity_vitb32": [0.3, 0.1], "watermark_score": [0.1, 0.1],
             "nsfw_score_opennsfw2": [0.1, 0.1], "aesthetic_score_laion_v2": [5.0, 5.0]},
            1,
        ),
    ],
)  # fmt: skip
def test_the_recipes_of_the_repository_take_the_columns_that_their_sets_are_known_to_have(
    tmp_path: Path, name: str, columns: dict[str, Any], taken: int
) -> None:
    urls = ["http://a/1", "http://a/2"]
    table = pa.table({name: urls if values is None else values for name, values in columns.items()})
    pq.write_table(table, tmp_path / "m.parquet")
    chosen = load(Path(__file__).parents[1] / "datasets" / f"{name}.toml")
    assert isinstance(chosen, WebRecipe)
    assert select(chosen, [tmp_path / "m.parquet"], tmp_path).rows == taken


def test_tab_separated_files_without_names_are_read(tmp_path: Path) -> None:
    (tmp_path / "m.tsv").write_text('http://a/1\tit is 5" wide\nhttp://a/2\t"quoted" it\'s\n')
    select(recipe(header=("url", "caption")), [tmp_path], tmp_path)
    assert [row["caption"] for row in selected(tmp_path)[1]] == ['it is 5" wide', '"quoted" it\'s']


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"filter": "similarity > 0.3"},
            'no column "similarity" (filter asks for it); they have: url, caption, number. In the recipe, say what '
            'they call it: columns = { similarity = ["ITS NAME"] }; or do without similarity there',
        ),
        (
            {"filter": "similarity > 0.3 and nsfw == 'x'", "save": ("similarity", "NUMBERS"),
             "columns": {"nsfw": ("nsfw", "NSFW")}},
            'no column "similarity" (filter and save ask for it), nor "NUMBERS" (save asks for it), '
            'nor "nsfw" or "NSFW" for nsfw (filter asks for it); they have: url, caption, number. In the recipe, say '
            'what they call it: columns = { similarity = ["ITS NAME"], NUMBERS = ["number"], nsfw = ["ITS NAME"] }; '
            "or do without similarity, NUMBERS, nsfw there",
        ),
        (
            {"columns": {"url": ("link", "href")}},
            'no column "link" or "href" for url (every recipe needs it); they have: url, caption, number. In the '
            'recipe, say what they call it: columns = { url = ["url"] }',
        ),
        ({"hash_kind": "md5"}, 'no column "hash" (hash_kind asks for it)'),
        ({"columns": {"face_boxes": ("boxes",)}}, 'no column "boxes" for face_boxes (columns asks for it)'),
        ({"filter": "number == 'a'"}, "does not fit the columns"),
        ({"filter": "number > 9"}, 'of 3 rows none passes filter = "number > 9"; loosen it'),
    ],
)  # fmt: skip
def test_metadata_that_do_not_fit_the_recipe_are_refused(tmp_path: Path, changes: Any, said: str) -> None:
    path = metadata(tmp_path / "m.parquet", 3)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is checked below
        select(recipe(**changes), [path], tmp_path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_metadata_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "bad.parquet", "cannot be read as metadata"),
        (tmp_path / "notes.txt", "its name must end in one of"),
        (tmp_path / "nowhere", "no such file or folder"),
        (tmp_path / "empty", "files in it"),
    ):
        with pytest.raises(ValueError, match=said):
            select(recipe(), [path], tmp_path)


def test_what_was_made_from_metadata_beside_them_is_none(tmp_path: Path) -> None:
    out = tmp_path / "meta" / "out"
    (out / "_work").mkdir(parents=True)
    metadata(tmp_path / "meta" / "m.parquet", 10)
    before = describe_files([tmp_path / "meta"])
    (out / "recipe.json").write_text("{}")
    metadata(out / "00000.parquet", 5)
    metadata(out / "_work" / "00000.parquet", 5)
    assert describe_files([tmp_path / "meta"]) == before
    assert select(recipe(), [tmp_path / "meta"], tmp_path).rows_read == 10
    # Named itself, it is meant.
    assert "2 files" in describe_files([out])


def test_a_file_that_differs_from_the_first_is_refused(tmp_path: Path) -> None:
    first = metadata(tmp_path / "1.parquet", 3)
    pq.write_table(pa.table({"url": ["http://a/1"], "text": ["t"]}), tmp_path / "2.parquet")
    with pytest.raises(ValueError, match=r'2\.parquet: the metadata have no column "caption"'):
        select(recipe(), [first, tmp_path / "2.parquet"], tmp_path)


def test_files_may_differ_in_the_width_of_their_numbers_and_in_what_else_they_hold(tmp_path: Path) -> None:
    for name, kind in (("1", pa.float32()), ("2", pa.float64())):
        table = {"url": [f"http://a/{name}"], "caption": ["t"], name: [0], "score": pa.array([0.5], kind)}
        pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
    select(recipe(filter="score > 0.1", save=("score",)), [tmp_path], tmp_path)
    assert [row["score"] for row in selected(tmp_path)[1]] == [0.5, 0.5]


def test_metadata_damaged_in_the_middle_are_named(tmp_path: Path) -> None:
    path = metadata(tmp_path / "m.parquet", 3000)
    content = bytearray(path.read_bytes())
    content[200:4000] = bytes(3800)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.parquet: (damaged metadata|cannot be read)"):
        select(recipe(), [path], tmp_path)


def test_memory_of_what_was_seen_is_bounded() -> None:
    seen = Seen(1 << 12)
    for start in range(0, 50_000, 5000):
        seen.repeated(pa.array([str(i) for i in range(start, start + 5000)]))
    assert sum(value.nbytes for value in vars(seen).values() if isinstance(value, np.ndarray)) < 100_000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"expected_rows": 100}, None),
        ({"expected_rows": 102}, None),
        ({"expected_rows": 99}, None),
        ({"expected_rows": 0}, None),
        ({"expected_rows": 400, "rows": 20}, None),
        ({"expected_rows": 400}, "the metadata have 100 rows, 25.0% of the 400 published"),
        ({"expected_rows": 50, "filter": "number < 10"}, "the metadata have 100 rows, 200.0% of the 50 published"),
    ],
)
def test_metadata_of_another_size_than_was_published_are_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str | None
) -> None:
    (tmp_path / "lists").mkdir()
    select(recipe(**changes), [metadata(tmp_path / "m.parquet", 100)], tmp_path / "lists")
    error = capsys.readouterr().err
    assert error.count("\n") == (said is not None)
    assert error.startswith(f"warning: {said}" if said else "")
