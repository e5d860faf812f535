"""Does the feature store keep every promise of docs/store-format.md?"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec

from features import files
from features.console import UserError
from features.entry import store_key
from features.fingerprint import fingerprint
from features.layout import Grid, decode_block, encode_block, rows_per_block
from features.samples import Samples, make_samples
from features.store import FeatureStore
from features.writer import Writer

N, WIDTH = 150, 4
POOLINGS = {"cls": WIDTH, "mean": WIDTH}
PARTS = {"model": "timm/x", "precision": "fp32", "transform": {"size": 224}}


def make_table(n: int = N, **changes: object) -> Samples:
    table = make_samples(
        [f"Atypical/{i}-é.png" for i in range(n)],
        [i % 2 for i in range(n)],
        sha256=[f"{i:064x}" for i in range(n)],
        group=[f"slide {i // 10}" for i in range(n)],
        votes=np.arange(3 * n, dtype=np.int8).reshape(n, 3) % 3 - 1,
    )
    return replace(table, **changes)


def embeddings(n: int = N, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((n, width)).astype(np.float32) for name, width in POOLINGS.items()}


def begin(store: FeatureStore, **changes: object) -> Writer:
    options = {"poolings": POOLINGS, "card_pooling": "cls+mean", "parts": PARTS} | changes
    return store.begin("ami-br", model="timm/x", view="full", **options)  # type: ignore[arg-type]


def fill(writer: Writer, n_blocks: int | None = None, seed: int = 0) -> None:
    values = embeddings(writer.entry.n_rows, seed)
    for rows in writer.missing()[:n_blocks]:
        block = {name: array[rows.start : rows.stop] for name, array in values.items()}
        writer.write(rows, block)


@pytest.fixture
def empty(tmp_path: Path) -> FeatureStore:
    store = FeatureStore.open_or_create(tmp_path / "embeddings.zarr")
    store.put_samples("ami-br", make_table(), attrs={"source": "somewhere"})
    return store


@pytest.fixture
def full(empty: FeatureStore) -> FeatureStore:
    fill(begin(empty))
    return empty


def read(store: FeatureStore, pooling: str = "card", **options: object) -> np.ndarray:
    return FeatureStore.open(store.path).read("ami-br", model="timm/x", view="full", pooling=pooling, **options)  # type: ignore[arg-type]


# Names, fingerprints, block sizes.


def test_names_become_single_safe_nodes() -> None:
    assert store_key("timm/x") == "timm--x"
    assert store_key("hf-hub:a/b@r") == "hf-hub--a--b@r"
    assert store_key("center64@224") == "center64@224"
    assert store_key("my data") == "my-data"


@pytest.mark.parametrize("name", ["", " ", "..", "a/../b", "a\nb", ".hidden", "./x", "__x", "zarr.json", "x" * 300])
def test_names_that_could_escape_or_clash_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="cannot name"):
        store_key(name)


def test_the_fingerprint_is_that_of_canonical_json() -> None:
    assert fingerprint({"b": [1, 2.5], "a": "é"}) == fingerprint({"a": "é", "b": [1, 2.5]})
    assert fingerprint({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # SHA-256 of {}
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint({"x": float("nan")})


def test_blocks_are_64_to_128_per_array_where_rows_allow() -> None:
    assert [rows_per_block(n) for n in (1, 746, 3720, 8192, 8193, 100_000)] == [64, 64, 64, 64, 128, 1024]
    assert [rows_per_block(n) for n in (1_000_000, 1_048_577, 100_000_000)] == [8192, 16384, 65536]
    assert all(64 <= -(-n // rows_per_block(n)) <= 128 for n in (5_000, 99_999, 2_000_000, 8_000_000))


# The patch table.


def test_a_patch_table_comes_back_as_it_was(empty: FeatureStore) -> None:
    stored = FeatureStore.open(empty.path).samples("ami-br")
    assert stored.table_digest == make_table().table_digest
    assert stored.id.dtype.kind == "U"
    assert stored.votes.shape == (N, 3)
    assert empty.datasets() == ["ami-br"]
    assert empty.dataset_attrs("ami-br")["source"] == "somewhere"


def test_a_table_without_raters_comes_back(tmp_path: Path) -> None:
    store = FeatureStore.open_or_create(tmp_path / "s")
    table = make_table(votes=np.empty((N, 0), np.int8), label=np.zeros(N, np.int8))
    store.put_samples("hf-hub:a/b", table, attrs={})
    assert store.samples("hf-hub:a/b").votes.shape == (N, 0)
    assert store.datasets() == ["hf-hub:a/b"]


def test_the_same_table_again_is_no_work_and_other_labels_update_it(full: FeatureStore) -> None:
    assert full.put_samples("ami-br", make_table(), attrs={}) is None
    relabelled = make_table(label=np.zeros(N, np.int8))
    assert full.put_samples("ami-br", relabelled, attrs={"source": "corrected"}) == ("0", "1")
    assert full.samples("ami-br").table_digest == relabelled.table_digest
    assert full.dataset_attrs("ami-br")["source"] == "corrected"
    assert len(read(full)) == N  # the embeddings stay


def test_other_images_under_the_same_name_are_refused_with_both_digests(full: FeatureStore) -> None:
    other = make_table(sha256=make_table().sha256[::-1])
    with pytest.raises(UserError, match="`overwrite=True`") as caught:
        full.put_samples("ami-br", other, attrs={})
    assert other.images_digest in str(caught.value)
    assert make_table().images_digest in str(caught.value)
    full.put_samples("ami-br", other, attrs={}, overwrite=True)
    assert full.samples("ami-br").images_digest == other.images_digest
    assert full.entries() == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "metadata"])
def test_a_damaged_table_is_named_and_written_anew(empty: FeatureStore, damage: str) -> None:
    column = empty.path / "ami-br" / "samples" / "label"
    chunk = column / "c.0"
    if damage == "flip":
        chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    elif damage == "truncate":
        chunk.write_bytes(chunk.read_bytes()[:3])
    elif damage == "delete":
        chunk.unlink()
    else:
        (column / "zarr.json").write_text("{")
    with pytest.raises(UserError, match=r"samples.*damaged"):
        empty.samples("ami-br")
    assert [problem.where for problem in empty.verify()] == ["ami-br"]
    empty.put_samples("ami-br", make_table(), attrs={})
    assert empty.verify() == []


def test_names_that_differ_only_in_special_characters_do_not_mix(empty: FeatureStore) -> None:
    empty.put_samples("a/b", make_table(), attrs={})
    with pytest.raises(UserError, match="special characters"):
        empty.put_samples("a:b", make_table(), attrs={})


# Writing and reading.


def test_what_is_written_is_read_in_any_pooling_and_any_rows(full: FeatureStore) -> None:
    expected = {name: values.astype(np.float16) for name, values in embeddings().items()}
    card = np.concatenate([expected["cls"], expected["mean"]], axis=1)
    np.testing.assert_array_equal(read(full), card)
    np.testing.assert_array_equal(read(full, "mean"), expected["mean"])
    np.testing.assert_array_equal(read(full, "mean+cls"), np.roll(card, WIDTH, axis=1))
    rows = np.array([149, 0, 64, 64, 63])
    np.testing.assert_array_equal(read(full, rows=rows), card[rows])
    mask = np.arange(N) % 7 == 0
    np.testing.assert_array_equal(read(full, rows=mask), card[mask])
    assert read(full, rows=np.array([], dtype=np.intp)).shape == (0, 2 * WIDTH)
    with pytest.raises(IndexError):
        read(full, rows=np.array([N]))


def test_an_entry_says_what_it_is(full: FeatureStore) -> None:
    (entry,) = full.entries("ami-br", "timm/x")
    assert (entry.name, entry.poolings, entry.card_pooling) == ("ami-br/timm/x/full", POOLINGS, "cls+mean")
    assert (entry.n_rows, entry.rows_per_block, entry.n_blocks, entry.n_done) == (N, 64, 3, 3)
    assert entry.fingerprint == fingerprint(PARTS)
    assert entry.parts == PARTS
    assert entry.complete
    assert not entry.imported
    assert full.entries("ami-br", "another") == full.entries("another") == []


def test_one_entry_is_had_by_its_names(full: FeatureStore) -> None:
    assert full.entry("ami-br", model="timm/x", view="full") == full.entries()[0]
    with pytest.raises(UserError, match=r"no embeddings of 'ami-br' by 'timm/x' with view 'ful'; .*Did you mean"):
        full.entry("ami-br", model="timm/x", view="ful")


def test_what_is_in_a_store_is_shown_at_a_prompt_and_in_a_notebook(full: FeatureStore) -> None:
    full.put_samples("<i>", make_table(3), attrs={})
    assert repr(full) == f"FeatureStore('{full.path}': <i>, ami-br)"
    assert repr(full.entries()[0]) == "Entry(ami-br/timm/x/full: 150 rows, cls 4, mean 4, complete)"
    rows = full.embeddings("ami-br", model="timm/x", view="full", rows=np.arange(7))
    assert repr(rows) == "Embeddings(ami-br/timm/x/full, cls+mean: 7 × 8 float16, not read yet)"
    page = full._repr_html_()
    assert "<td>timm/x</td><td>full</td><td>150</td><td>cls × 4, mean × 4</td><td>3 of 3</td>" in page
    assert "<td>&lt;i&gt;</td>" in page
    assert "<i>" not in page
    path = full.entries()[0].block_path("mean", 2)
    path.unlink()
    assert "2 of 3 blocks" in repr(full.entries()[0])


def test_unknown_names_are_answered_with_the_known_ones(full: FeatureStore) -> None:
    with pytest.raises(UserError, match="no pooling 'center'; it has cls, mean"):
        read(full, "center")
    with pytest.raises(UserError, match="it has: timm/x/full"):
        full.read("ami-br", model="timm/y", view="full")
    with pytest.raises(UserError, match=r"it has: ami-br\. Did you mean ami-br"):
        full.read("ami-b", model="timm/x", view="full")


def test_an_interrupted_entry_goes_on_and_cannot_be_read_before(empty: FeatureStore) -> None:
    fill(begin(empty), n_blocks=2)
    with pytest.raises(UserError, match=r"1 of 3 blocks.*fm-extract again.*128–149"):
        read(empty)
    writer = begin(empty)
    assert writer.missing() == [range(128, 150)]
    assert writer.missing(range(64, 150)) == [range(128, 150)]
    assert writer.missing(range(0, 149)) == []
    fill(writer)
    assert writer.missing() == []
    assert len(read(empty)) == N


def test_a_block_counts_as_done_only_with_its_last_pooling(
    empty: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    original = files.write_file

    def fail_at_the_last(path: Path, pieces: list[memoryview]) -> None:
        written.append(path.parent.name)
        if path.parent.name == "mean":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, pieces)

    writer = begin(empty)
    monkeypatch.setattr("features.storage_local.write_file", fail_at_the_last)
    with pytest.raises(UserError, match=r"No space left.*free some space.*same command again"):
        fill(writer, n_blocks=1)
    assert written == ["cls", "mean"]
    assert len(writer.missing()) == 3


@pytest.mark.parametrize("code", [errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_gives_one_message(empty: FeatureStore, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(path: Path) -> None:
        raise OSError(code, os.strerror(code))

    writer = begin(empty)
    fill(writer, n_blocks=1)
    monkeypatch.setattr("features.files.flush", refuse)
    with pytest.raises(UserError, match="written so far is kept"):
        fill(writer)
    with pytest.raises(UserError, match="cannot write to"):
        FeatureStore.open_or_create(empty.path.parent / "other")
    monkeypatch.undo()
    assert writer.missing()[-1] == range(128, 150)
    assert not list(empty.path.rglob("*.partial"))


def test_a_file_that_cannot_grow_leaves_no_half_block(empty: FeatureStore) -> None:
    writer = begin(empty)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    try:
        with pytest.raises(UserError, match="cannot write"):
            fill(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(writer.missing()) == 3
    fill(writer)
    assert len(read(empty)) == N


@pytest.mark.parametrize(
    ("value", "what"),
    [(np.nan, "NaN or infinite"), (np.inf, "NaN or infinite"), (70_000, "beyond the range of float16")],
)
def test_numbers_that_float16_cannot_hold_are_refused_by_name(empty: FeatureStore, value: float, what: str) -> None:
    block = {name: values[64:128] for name, values in embeddings().items()}
    block["mean"][5, 2] = value
    with pytest.raises(
        UserError, match=f"timm/x/full/mean: 1 embeddings are {re.escape(what)}.*row 69, Atypical/69-é.png"
    ):
        begin(empty).write(range(64, 128), block)
    assert len(begin(empty).missing()) == 3


def test_blocks_of_another_shape_or_pooling_are_a_programming_error(empty: FeatureStore) -> None:
    values = embeddings()
    with pytest.raises(ValueError, match="expected"):
        begin(empty).write(range(64), {"cls": values["cls"][:64]})
    with pytest.raises(ValueError, match="expected"):
        begin(empty).write(range(128, 150), {name: array[:64] for name, array in values.items()})
    with pytest.raises(ValueError, match="not the rows of a block"):
        begin(empty).write(range(32, 96), {name: array[32:96] for name, array in values.items()})


def test_another_fingerprint_is_refused_with_both_values(full: FeatureStore) -> None:
    other = PARTS | {"precision": "bf16", "transform": {"size": 160}}
    with pytest.raises(UserError, match="`overwrite=True`") as caught:
        begin(full, parts=other)
    assert 'precision: stored "fp32", now "bf16"' in str(caught.value)
    assert "transform.size: stored 224, now 160" in str(caught.value)
    assert "model" not in str(caught.value)
    with pytest.raises(UserError, match="card_pooling"):
        begin(full, card_pooling="cls")
    assert len(begin(full, parts=other, overwrite=True).missing()) == 3
    assert full.entries()[0].parts == other


def test_the_batch_size_is_recorded_outside_the_fingerprint(empty: FeatureStore) -> None:
    writer = begin(empty)
    assert writer.entry.batch_size is None
    writer.set_batch_size(16)
    again = begin(empty).entry
    assert (again.batch_size, again.fingerprint) == (16, fingerprint(PARTS))


def test_only_a_writer_that_is_alone_sweeps_or_overwrites(empty: FeatureStore) -> None:
    first = begin(empty)
    leftover = first.entry.folder / "cls" / ".c.0.0.0123.partial"
    leftover.write_bytes(b"half")
    second = begin(empty)
    assert leftover.exists()  # it may be the first writer's, at work
    with pytest.raises(UserError, match="being written"):
        begin(empty, overwrite=True)
    with pytest.raises(UserError, match="being written"):
        empty.remove("ami-br")
    del first, second
    begin(empty)
    assert not leftover.exists()


def test_a_writer_that_shares_its_entry_with_other_machines_sweeps_nothing(empty: FeatureStore) -> None:
    leftover = begin(empty).entry.folder / "cls" / ".c.0.0.0123.partial"
    leftover.write_bytes(b"half")
    begin(empty, shared=True)
    assert leftover.exists()  # locks of this machine say nothing of another's writer
    begin(empty)
    assert not leftover.exists()


def test_remove_takes_an_entry_a_model_or_a_dataset(full: FeatureStore) -> None:
    with pytest.raises(ValueError, match="of one model"):
        full.remove("ami-br", view="full")
    with pytest.raises(UserError, match="has no ami-br/timm/y"):
        full.remove("ami-br", model="timm/y")
    full.remove("ami-br", model="timm/x", view="full")
    assert full.entries() == []
    full.remove("ami-br")
    assert full.datasets() == []
    assert FeatureStore.open(full.path).verify() == []


# Opening.


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        FeatureStore.open(tmp_path / "none")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").touch()
    with pytest.raises(UserError, match="nothing was changed"):
        FeatureStore.open_or_create(tmp_path / "data")
    zarr.create_group(tmp_path / "other.zarr")
    with pytest.raises(UserError, match="not a mitofm feature store"):
        FeatureStore.open_or_create(tmp_path / "other.zarr")


def test_a_newer_format_is_refused_with_what_to_do(empty: FeatureStore) -> None:
    document = json.loads((empty.path / "zarr.json").read_text())
    document["attributes"]["format_version"] = 3
    del document["attributes"]["attributes_digest"]
    (empty.path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"format 3.*up to 2.*Upgrade"):
        FeatureStore.open(empty.path)


def test_the_archived_store_of_format_1_opens_and_gives_its_numbers(tmp_path: Path) -> None:
    with zipfile.ZipFile(Path(__file__).parent / "data" / "store-v1.zarr.zip") as archive:
        archive.extractall(tmp_path)
    store = FeatureStore.open(tmp_path / "store-v1.zarr")
    assert store.verify() == []
    samples = store.samples("ami-br")
    assert samples.id[[0, 99]].tolist() == ["Atypical/0.png", "Normal/99.png"]
    assert (int(samples.label.sum()), samples.votes[3].tolist()) == (25, [-1, 0, 1])
    (entry,) = store.entries()
    assert (entry.model, entry.view, entry.batch_size) == ("hf-hub:org/name@main", "center64", 8)
    expected = np.arange(100 * 6).reshape(100, 6) / 8
    np.testing.assert_array_equal(store.read("ami-br", model=entry.model, view="center64", pooling="cls"), expected)
    np.testing.assert_array_equal(
        store.read("ami-br", model=entry.model, view="center64"), np.concatenate([expected, -expected], 1)
    )


def test_zarr_tensorstore_and_xarray_read_it(full: FeatureStore) -> None:
    expected = embeddings()["cls"].astype(np.float16)
    inside = "ami-br/timm--x/full"
    np.testing.assert_array_equal(zarr.open(full.path, mode="r")[f"{inside}/cls"][...], expected)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(full.path / inside / "cls")}}
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), expected)
    with xarray.open_zarr(full.path, group=inside, consolidated=False) as dataset:
        assert dataset["cls"].dims == ("sample", "feature")
        assert dataset["cls"].dtype == np.float16
        np.testing.assert_array_equal(dataset["cls"].values, expected)
    with xarray.open_zarr(full.path, group="ami-br/samples", consolidated=False) as table:
        assert table["id"].values.tolist() == make_table().id.tolist()


@pytest.mark.parametrize(("n", "block", "chunk"), [(150, 64, 64), (300, 128, 64)])
def test_blocks_are_byte_for_byte_what_zarr_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, block: int, chunk: int
) -> None:
    monkeypatch.setattr("features.layout.ROWS_PER_CHUNK", chunk)
    grid = Grid(n, WIDTH, block)
    values = np.random.default_rng(0).standard_normal((n, WIDTH)).astype(np.float16)
    array = zarr.create_array(
        tmp_path / "a.zarr",
        shape=(n, WIDTH),
        chunks=(chunk, WIDTH),
        shards=(block, WIDTH) if block > chunk else None,
        dtype="float16",
        fill_value=np.nan,
        serializer=BytesCodec(),
        compressors=Crc32cCodec(),
        dimension_names=("sample", "feature"),
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    array[...] = values
    document = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    assert document | grid.metadata() == document
    for start in range(0, n, block):
        theirs = (tmp_path / "a.zarr" / f"c.{start // block}.0").read_bytes()
        rows = values[start : start + block]
        assert b"".join(encode_block(rows, grid)) == theirs
        np.testing.assert_array_equal(
            decode_block(theirs, len(rows), grid, check=True).reshape(-1, WIDTH)[: len(rows)], rows
        )
        for bit in range(0, 8 * len(theirs), 5):
            with pytest.raises(ValueError, match="damaged"):
                decode_block(flipped(theirs, bit), len(rows), grid, check=True)


def test_a_store_of_shards_reads_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("features.layout.ROWS_PER_CHUNK", 16)
    store = FeatureStore.open_or_create(tmp_path / "s")
    store.put_samples("ami-br", make_table(), attrs={})
    fill(begin(store))
    expected = embeddings()["mean"].astype(np.float16)
    rows = np.array([149, 3, 66, 129])
    np.testing.assert_array_equal(read(store, "mean"), expected)
    np.testing.assert_array_equal(read(store, "mean", rows=rows), expected[rows])
    np.testing.assert_array_equal(zarr.open(store.path, mode="r")["ami-br/timm--x/full/mean"][...], expected)
    assert store.verify() == []


# Damage.


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def test_any_flipped_bit_of_a_block_is_found_and_the_block_named(full: FeatureStore) -> None:
    path = full.entries()[0].block_path("cls", 1)
    data = path.read_bytes()
    named = (
        r"ami-br/timm/x/full/cls: block 1 \(rows 64–127\).*c\.1\.0.*delete .*mean/c\.1\.0 and run the same fm-extract"
    )
    for bit in range(0, 8 * len(data), 7):
        path.write_bytes(flipped(data, bit))
        with pytest.raises(UserError, match=named):
            full.read("ami-br", model="timm/x", view="full", pooling="cls", rows=np.array([100]))
    (problem,) = full.verify()
    assert (problem.where, problem.block, problem.rows) == ("ami-br/timm/x/full/cls", 1, (64, 127))
    path.write_bytes(data)
    assert full.verify() == []


@pytest.mark.parametrize("size", [0, 3, 100, 515, 517])
def test_a_block_of_the_wrong_size_is_named(full: FeatureStore, size: int) -> None:
    path = full.entries()[0].block_path("mean", 2)
    path.write_bytes((path.read_bytes() + b"x")[:size])
    with pytest.raises(UserError, match=f"block 2 .*has {size} bytes instead of 516"):
        read(full)
    assert len(full.verify()) == 1


def test_a_lost_block_of_an_earlier_pooling_is_damage_and_mended_as_the_message_says(full: FeatureStore) -> None:
    entry = full.entries()[0]
    entry.block_path("cls", 0).unlink()
    assert full.entries()[0].complete  # by the rule; but:
    with pytest.raises(UserError, match=r"block 0 .*cannot be read"):
        read(full)
    entry.block_path("mean", 0).unlink()  # the remedy
    fill(begin(full))
    assert full.verify() == []


def test_a_block_that_changes_after_it_was_verified_is_verified_again(full: FeatureStore) -> None:
    path = full.entries()[0].block_path("cls", 0)
    full.read("ami-br", model="timm/x", view="full")
    path.write_bytes(flipped(path.read_bytes(), 77))
    with pytest.raises(UserError, match="block 0"):
        full.read("ami-br", model="timm/x", view="full")


def test_verify_names_a_dataset_in_the_folder_of_another_and_refuses_one_that_is_not_there(full: FeatureStore) -> None:
    (full.path / "ami-br").rename(full.path / "other")
    assert any("attributes are those of the dataset 'ami-br'" in problem.what for problem in full.verify())
    with pytest.raises(UserError, match="no dataset 'ami-br'"):
        full.verify("ami-br")


def test_blocks_are_seen_while_another_writer_renames_its_unfinished_file(
    empty: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = begin(empty)
    fill(writer, n_blocks=2)
    unfinished = writer.entry.folder / "mean" / ".c.2.0.0123.partial"
    scandir = os.scandir

    def renamed_meanwhile(path: Path):  # type: ignore[no-untyped-def]
        unfinished.write_bytes(b"half")
        with scandir(path) as listed:
            entries = list(listed)
        unfinished.unlink()
        return nullcontext(entries)

    monkeypatch.setattr("features.storage_local.os.scandir", renamed_meanwhile)
    assert writer.missing() == [range(128, 150)]


def test_a_dataset_folder_without_metadata_is_written_anew(full: FeatureStore) -> None:
    (full.path / "ami-br" / "zarr.json").unlink()
    full.put_samples("ami-br", make_table(), attrs={})
    assert full.samples("ami-br").table_digest == make_table().table_digest
    assert not list(full.path.rglob("*.partial"))


def test_verify_reports_what_is_missing_and_what_is_not_finite(empty: FeatureStore) -> None:
    fill(begin(empty), n_blocks=2)
    entry = empty.entries()[0]
    bad = np.full((64, WIDTH), np.inf, np.float16)
    files.write_file(entry.block_path("cls", 0), encode_block(bad, entry.grid("cls")))
    incomplete, infinite = empty.verify()
    assert "1 of 3 blocks are missing" in incomplete.what
    assert "holds NaN or infinity" in infinite.what


def test_no_damage_to_any_metadata_or_table_file_goes_unseen_or_ends_in_a_traceback(full: FeatureStore) -> None:
    table, values = full.samples("ami-br").table_digest, read(full)
    for path in sorted(full.path.rglob("*")):
        if path.is_dir() or ("timm--x" in path.parts and path.name != "zarr.json"):
            continue
        data = path.read_bytes()
        for byte in range(0, len(data), 61):
            path.write_bytes(flipped(data, 8 * byte + byte % 8))
            try:
                store = FeatureStore.open(full.path)
                if not store.verify() and len(store.entries()) == 1:
                    assert store.samples("ami-br").table_digest == table
                    np.testing.assert_array_equal(read(store), values)
            except UserError:
                pass
        path.write_bytes(data)


def test_a_changed_attribute_is_refused_and_a_store_without_digests_is_read(empty: FeatureStore) -> None:
    path = empty.path / "ami-br" / "zarr.json"
    whole = path.read_text()
    path.write_text(whole.replace("somewhere", "somewhera"))
    with pytest.raises(UserError, match="attributes do not match their digest"):
        empty.samples("ami-br")
    document = json.loads(whole)
    del document["attributes"]["attributes_digest"]
    path.write_text(json.dumps(document))
    assert empty.dataset_attrs("ami-br")["source"] == "somewhere"
    assert empty.verify() == []


@pytest.mark.parametrize("pooling", ["../../../elsewhere", "\x1b[2J", "/tmp"])
def test_a_pooling_that_names_no_folder_of_its_own_is_refused(full: FeatureStore, pooling: str) -> None:
    path = next(full.path.glob("ami-br/*/*/zarr.json"))
    document = json.loads(path.read_text())
    document["attributes"]["poolings"].append({"name": pooling, "width": 4})
    del document["attributes"]["attributes_digest"]
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="its attributes"):
        full.entries()
    assert len(full.verify()) == 1


# Interruption.

KILLER = Path(__file__).parent / "killed_writer.py"


def test_a_writer_killed_before_any_file_operation_leaves_a_store_that_the_next_run_finishes(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, KILLER, tmp_path, "19"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stores identical" in done.stdout


# What a power failure leaves: nothing has its final name before it is on the disk, and the name follows at once.


class Disk:
    """Notes in which order files and folders are made, made safe, renamed and removed."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, Path]] = []
        self.safe: dict[tuple[int, int], tuple[int, list[str]]] = {}  # by device and inode: what was on the disk
        self.unsafe: list[str] = []
        fsync = os.fsync
        patched.setattr(os, "fsync", lambda descriptor: (fsync(descriptor), self.noted(descriptor))[0])
        for name in ("rename", "replace"):
            patched.setattr(os, name, self.renaming(getattr(os, name)))
        patched.setattr(os, "mkdir", self.noting("mkdir", os.mkdir))
        for name in ("unlink", "remove", "rmdir"):
            patched.setattr(os, name, self.noting("remove", getattr(os, name)))

    def noted(self, descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        self.safe[self.key(path)] = self.state(path)
        self.events.append(("fsync", path))

    def noting(self, what: str, function):  # type: ignore[no-untyped-def]
        def noted(path, *given, **options):  # type: ignore[no-untyped-def]
            done = function(path, *given, **options)
            self.events.append((what, Path(path)))
            return done

        return noted

    def renaming(self, function):  # type: ignore[no-untyped-def]
        def renamed(old, new, **options):  # type: ignore[no-untyped-def]
            if not str(new).endswith(".partial"):  # such names mean nothing to anybody
                inside = [Path(old), *Path(old).rglob("*")] if Path(old).is_dir() else [Path(old)]
                self.unsafe += [
                    f"{new} before {path}" for path in inside if self.safe.get(self.key(path)) != self.state(path)
                ]
            done = function(old, new, **options)
            self.events.append(("rename", Path(new)))
            self.events.append(("gone", Path(old)))
            return done

        return renamed

    @staticmethod
    def key(path: Path) -> tuple[int, int]:
        status = path.stat()
        return status.st_dev, status.st_ino

    @staticmethod
    def state(path: Path) -> tuple[int, list[str]]:
        """What must not change after the last fsync: a file's length, a folder's names."""
        return (0, sorted(os.listdir(path))) if path.is_dir() else (path.stat().st_size, [])  # noqa: PTH208

    def check(self) -> int:
        """No name is new or gone without an fsync of its folder before the next name or removal; how many were."""
        pending: dict[Path, Path] = {}
        n = 0
        for what, path in self.events:
            if what == "fsync":
                pending = {name: folder for name, folder in pending.items() if folder != path}
            elif what in ("rename", "gone", "mkdir") and ".partial" not in str(path):
                if what == "rename":
                    assert not [name for name, folder in pending.items() if folder != path.parent], (path, pending)
                pending[path] = path.parent
                n += 1
            elif what == "remove":
                assert not pending, (path, pending)  # what is removed is out of the way first, on the disk too
        assert not pending
        assert self.unsafe == []
        return n


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.skipif(sys.platform != "linux", reason="what a descriptor is of, as Linux tells it")
def test_every_file_and_folder_is_on_the_disk_before_its_name_and_the_name_before_the_next(
    tmp_path: Path, disk: Disk
) -> None:
    made = []
    store = FeatureStore.open_or_create(tmp_path / "store")
    made.append(disk.check())
    store.put_samples("ami-br", make_table(), attrs={})
    made.append(disk.check())
    writer = begin(store)
    writer.set_batch_size(8)
    made.append(disk.check())
    fill(writer)
    made.append(disk.check())
    names = [path.name for what, path in disk.events if what == "rename"]
    assert names[-6:] == ["c.0.0", "c.0.0", "c.1.0", "c.1.0", "c.2.0", "c.2.0"]
    store.put_samples("ami-br", make_table(label=np.ones(N, np.int8)), attrs={})  # the table is replaced
    made.append(disk.check())
    del writer
    begin(store, parts={"other": 1}, overwrite=True)
    made.append(disk.check())
    store.remove("ami-br", model="timm/x")
    made.append(disk.check())
    assert made == sorted(set(made))  # each of these steps made something


@pytest.mark.skipif(sys.platform != "linux", reason="what a descriptor is of, as Linux tells it")
def test_a_file_replaces_another_only_when_it_is_on_the_disk(tmp_path: Path, disk: Disk) -> None:
    (tmp_path / "x").write_text("old")
    files.write_file(tmp_path / "x", [b"n", memoryview(b"ew")])
    assert disk.check() == 1
    assert [what for what, _ in disk.events] == ["fsync", "rename", "gone", "fsync"]
    assert (tmp_path / "x").read_bytes() == b"new"

    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        files.write_file(tmp_path / "x", pieces())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"new"


@pytest.mark.parametrize(
    ("name", "value"),
    [("card_pooling", "cls+max"), ("card_pooling", ""), ("n_rows", 0), ("model", "timm/y"), ("rows_per_block", 1)],
)
def test_an_entry_that_contradicts_itself_is_refused(full: FeatureStore, name: str, value: object) -> None:
    path = next(full.path.glob("ami-br/*/*/zarr.json"))
    document = json.loads(path.read_text())
    document["attributes"][name] = value
    del document["attributes"]["attributes_digest"]
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="its attributes contradict each other"):
        full.entries()


@pytest.mark.parametrize("poolings", [{"card": 4}, {"cls+mean": 4}, {"cls": 0}, {"a/b": 4}])
def test_a_pooling_that_could_be_taken_for_another_is_a_programming_error(
    full: FeatureStore, poolings: dict[str, int]
) -> None:
    (name,) = poolings
    with pytest.raises(ValueError, match=r"cannot be a pooling"):
        full.begin("ami-br", model="y", view="full", poolings=poolings, card_pooling=name, parts={})
    assert full.entries("ami-br", "y") == []


def test_an_entrys_folder_and_files_are_where_it_says(full: FeatureStore) -> None:
    (entry,) = full.entries()
    assert (Path(entry.folder) / "zarr.json").is_file()
    assert Path(entry.block_path("mean", 2)) == Path(entry.folder) / "mean" / "c.2.0"
    assert Path(entry.block_path("mean", 2)).is_file()


@pytest.mark.parametrize("rows", [[3, 3, 5], [5, 4], [70, 3]])
def test_blocks_of_repeated_or_descending_rows_are_refused(full: FeatureStore, rows: list[int]) -> None:
    stored = full.embeddings("ami-br", model="timm/x", view="full", rows=np.array(rows))
    with pytest.raises(ValueError, match="ascending order only"):
        list(stored.blocks())


def test_other_names_of_the_same_classes_are_recorded(empty: FeatureStore) -> None:
    attrs = {"label_names": ["normal", "cancer"], "source": "there"}
    assert empty.put_samples("mine", make_table(), attrs=attrs) is None
    assert empty.put_samples("mine", make_table(), attrs=attrs | {"source": "moved"}) is None
    assert empty.put_samples("mine", make_table(), attrs=attrs | {"label_names": ["normal", "tumor"]}) == (
        "normal",
        "cancer",
    )
    assert empty.dataset_attrs("mine")["label_names"] == ["normal", "tumor"]
    assert empty.dataset_attrs("mine")["source"] == "there"
    assert empty.verify() == []


def test_the_same_images_in_another_order_are_called_so(full: FeatureStore) -> None:
    table = make_table()
    with pytest.raises(UserError, match="of other images \\(in another order, or with other ids\\)"):
        full.put_samples("ami-br", table.select(np.arange(len(table))[::-1]), attrs={})


def test_patches_that_were_cut_from_slides_by_other_options_are_called_so(empty: FeatureStore) -> None:
    empty.put_samples("points", make_table(), attrs={"slides": {"folder": "/slides", "size": 128}})
    others = make_table(sha256=np.array([f"{i + 1:064x}" for i in range(N)]))
    with pytest.raises(UserError, match="of other images \\(cut from slides by `size=128`, now by `size_um=64`\\): "):
        empty.put_samples("points", others, attrs={"slides": {"folder": "/moved", "size_um": 64}})
    with pytest.raises(UserError, match="of other images: "):
        empty.put_samples("points", others, attrs={"slides": {"folder": "/moved", "size": 128}})


# More than two classes.


def several(labels: tuple[int, ...] = (2, 0, 1, 2)) -> Samples:
    votes = np.array(labels, np.int8)[:, None]
    return make_samples(
        [f"{k}.png" for k in range(len(labels))], labels, sha256=list("abcdefgh")[: len(labels)], votes=votes
    )


def root_of(store: FeatureStore) -> dict[str, object]:
    attributes = json.loads((Path(store.path) / "zarr.json").read_text())["attributes"]
    del attributes["attributes_digest"]
    return dict(attributes)


def test_a_dataset_of_more_than_two_classes_makes_the_store_format_2(empty: FeatureStore) -> None:
    two = {"format": "mitofm-features", "format_version": 1}
    assert root_of(empty) == two
    names = ["none", "mild", "severe"]
    empty.put_samples("two", several((1, 0, 1)), attrs={"label_names": ["no", "yes"]})
    assert root_of(empty) == two
    empty.put_samples("grades", several(), attrs={"label_names": names, "ordinal": True})
    assert root_of(empty) == two | {"format_version": 2}
    store = FeatureStore.open_or_create(empty.path)
    assert store.verify() == []
    assert store.samples("grades").table_digest == several().table_digest
    assert store.class_names("grades") == ("none", "mild", "severe")
    assert store.dataset_attrs("grades")["ordinal"] is True
    assert store.class_names("two") == ("no", "yes")
    assert store.class_names("ami-br") == ("0", "1")
    assert "ordinal" not in store.dataset_attrs("two")
    store.put_samples("grades", several((0, 0, 1, 1)), attrs={"label_names": ["no", "yes"]})
    assert store.class_names("grades") == ("no", "yes")
    assert root_of(store)["format_version"] == 2  # it stays


@pytest.mark.parametrize(("labels", "names"), [((1, 0, 1), ["a", "b", "c"]), ((2, 0, 1), None)])
def test_classes_that_are_absent_or_have_no_names_count_too(
    tmp_path: Path, labels: tuple[int, ...], names: list[str] | None
) -> None:
    store = FeatureStore.open_or_create(tmp_path / "s")
    store.put_samples("d", several(labels), attrs={} if names is None else {"label_names": names})
    assert root_of(store)["format_version"] == 2
    assert store.class_names("d") == tuple(names or ("0", "1", "2"))


def test_the_format_is_raised_before_the_dataset_is_there(empty: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever knows format 1 alone never opens a store that has such a dataset, not even while it is written."""
    versions: list[object] = []

    def killed(*_: object, **__: object) -> None:
        versions.append(root_of(empty)["format_version"])
        raise KeyboardInterrupt

    monkeypatch.setattr(type(empty.storage), "put_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        empty.put_samples("grades", several(), attrs={})
    monkeypatch.undo()
    empty.put_samples("two", several((1, 0)), attrs={})
    monkeypatch.setattr(type(empty.storage), "put_folder", killed)
    with pytest.raises(KeyboardInterrupt):
        empty.put_samples("two", several((1, 2)), attrs={})  # the same images under other labels
    assert versions == [2, 2]


def test_names_that_are_fewer_than_the_classes_are_a_programming_error(empty: FeatureStore) -> None:
    with pytest.raises(ValueError, match="2 label_names for 3 classes"):
        empty.put_samples("grades", several(), attrs={"label_names": ["a", "b"]})
    assert empty.datasets() == ["ami-br"]


def test_another_order_of_the_classes_replaces_labels_and_names_together(empty: FeatureStore) -> None:
    old, new = ("none", "mild", "severe"), ("severe", "mild", "none")
    empty.put_samples("grades", several(), attrs={"label_names": list(old), "ordinal": True})
    turned = several().relabelled((2, 1, 0))
    assert empty.put_samples("grades", turned, attrs={"label_names": list(new), "ordinal": True}) == old
    stored = empty.samples("grades")
    assert empty.class_names("grades") == new
    for samples, names in ((several(), old), (stored, new)):
        assert [names[k] for k in samples.label] == ["severe", "none", "mild", "severe"]
        assert [names[k] for k in samples.votes[:, 0]] == ["severe", "none", "mild", "severe"]
    # Grades that are none any more are said to have changed, though labels and names are the same.
    assert empty.put_samples("grades", turned, attrs={"label_names": list(new)}) == new
    assert "ordinal" not in empty.dataset_attrs("grades")
    assert empty.put_samples("grades", turned, attrs={"label_names": list(new)}) is None
    assert empty.verify() == []
