"""Do embeddings come in as they were meant, or not at all, and go out as other tools read them?"""

from __future__ import annotations

import os
import re
from pathlib import Path

import anndata
import h5py
import ml_dtypes
import numpy as np
import pytest
import scipy.sparse
import torch
from numpy.typing import NDArray

from features.console import UserError
from features.embedding_files import coordinates
from features.exchange import export_embeddings, import_embeddings
from features.files import check_output
from features.samples import make_samples
from features.store import FeatureStore

N, D = 12, 5
IDS = [f"Atypical/tile_x{256 * row}_y{64 * row}.png" for row in range(N)]
VALUES = np.random.default_rng(0).normal(size=(N, D)).astype(np.float32)


def make_store(path: Path, ids: list[str] = IDS) -> FeatureStore:
    store = FeatureStore.open_or_create(path)
    digests = [str(row) for row in range(len(ids))]
    store.put_samples("d", make_samples(ids, [row % 2 for row in range(len(ids))], sha256=digests), attrs={})
    return store


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return make_store(tmp_path / "store")


def come_in(store: FeatureStore, source: Path, ids: Path | None = None) -> NDArray[np.float16]:
    """The embeddings of `source`, as they are in the store after their import."""
    import_embeddings(store, source, dataset="d", model="m", view="full", ids=ids, overwrite=True)
    return store.read("d", model="m", view="full")


def npz(folder: Path, features: object, ids: object = IDS) -> Path:
    np.savez(folder / "x.npz", features=features, ids=ids)  # type: ignore[arg-type]
    return folder / "x.npz"


def refused(store: FeatureStore, source: Path, ids: Path | None = None) -> str:
    with pytest.raises(UserError) as error:
        come_in(store, source, ids)
    assert store.entries() == []
    return str(error.value)


# ------------------------------------------------------------------------------------------------ what float16 can hold


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_embeddings_of_any_float_type_come_in_rounded_to_float16(
    store: FeatureStore, tmp_path: Path, dtype: str
) -> None:
    values = VALUES.astype(dtype)
    np.testing.assert_array_equal(come_in(store, npz(tmp_path, values)), values.astype(np.float16))


def test_numbers_too_small_for_float16_are_refused_with_the_factor_that_saves_them(
    store: FeatureStore, tmp_path: Path
) -> None:
    tiny = VALUES * 1e-9
    said = refused(store, npz(tmp_path, tiny))
    assert f"{N * D} numbers that are not zero would become zero, and {N} whole rows" in said
    assert f"between {np.abs(tiny).min():.2g} and" in said
    assert "Multiply all of them by 2**34" in said  # the largest becomes some 40
    np.testing.assert_array_equal(come_in(store, npz(tmp_path, tiny * 2.0**34)), (tiny * 2.0**34).astype(np.float16))


def test_subnormal_numbers_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    subnormal = (0.5 + VALUES / 10) * 2e-6  # a few bits are left of each, and none becomes zero
    assert (subnormal.astype(np.float16) != 0).all()
    said = refused(store, npz(tmp_path, subnormal))
    assert "in 5 of 5 columns rounding would change" in said
    assert "Multiply all of them by 2**" in said


def test_a_mean_far_from_zero_is_refused_and_no_factor_is_advised(store: FeatureStore, tmp_path: Path) -> None:
    said = refused(store, npz(tmp_path, 1000 + VALUES / 10))
    assert "in 5 of 5 columns" in said
    assert "Multiply" not in said
    assert "Standardise every column" in said


def test_one_row_that_vanishes_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    values = VALUES.copy()
    values[3] *= 1e-12
    assert "and 1 whole rows" in refused(store, npz(tmp_path, values))


def test_a_few_numbers_near_zero_do_no_harm(store: FeatureStore, tmp_path: Path) -> None:
    values = VALUES.copy()
    values[3, 2] = 1e-12
    assert come_in(store, npz(tmp_path, values))[3, 2] == 0


def test_a_dead_column_among_many_is_said_and_comes_in(
    store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(1).normal(size=(N, 200)).astype(np.float32)
    values[:, 7] *= 1e-12
    come_in(store, npz(tmp_path, values))
    assert "1 of 200 columns vary too little for float16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: x * 1e6,
            r"12 embeddings \('.*x0_y0.png', .*, …\) hold numbers beyond the range.*Multiply.*by 2\*\*-",
        ),
        (lambda x: np.where(x == x[2, 1], np.inf, x), r"1 embedding \('.*x512_y128.png'\) holds NaN or infinity"),
        (lambda x: np.where(np.arange(N)[:, None] == 4, 0, x), r"1 embedding \('.*x1024_y256.png'\) holds zeros only"),
        (lambda x: np.broadcast_to(x[0], x.shape), r"all 12 embeddings are equal"),
        (lambda x: np.tile(1e4 * np.random.default_rng(0).random(200), (N, 1)), r"all 12 embeddings are equal"),
    ],
    ids=["too large", "infinite", "zeros", "equal", "equal and wide"],
)
def test_what_cannot_be_an_embedding_is_refused(store: FeatureStore, tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    said = refused(store, npz(tmp_path, change(VALUES)))
    assert re.search(message, said), said


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(N * D).reshape(N, D), "int64.*multiply by their scale"),
        (VALUES.astype(ml_dtypes.bfloat16), "may be bfloat16"),
        (VALUES > 0, "bool"),
        (VALUES.astype(complex), "complex128"),
        (VALUES.T, r"\(5, 12\), and there are 12 ids.*features.T"),
        (np.stack([VALUES, VALUES], axis=1), r"\(12, 2, 5\).*several tokens"),
        (VALUES[:, :0], r"expected \(12, d\)"),
    ],
    ids=["integers", "bfloat16", "bool", "complex", "transposed", "tokens", "empty"],
)
def test_arrays_of_other_types_and_shapes_are_refused_by_name(
    store: FeatureStore, tmp_path: Path, values: object, message: str
) -> None:
    said = refused(store, npz(tmp_path, values))
    assert re.search(message, said), said


@pytest.mark.parametrize("shape", [(1, N, D), (N, 1, D), (N, D, 1, 1)])
def test_axes_of_length_one_are_left_out(store: FeatureStore, tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.testing.assert_array_equal(come_in(store, npz(tmp_path, VALUES.reshape(shape))), VALUES.astype(np.float16))


# ---------------------------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    ("spell", "said"),
    [
        (lambda id: f" {id}\t", "spaces around them"),
        (lambda id: ".\\" + id.replace("/", "\\"), "kind of separators"),
        (lambda id: id.removesuffix(".png"), "their suffixes"),
        (lambda id: id.rpartition("/")[2], "their folders,"),
        (lambda id: "C:\\data\\" + id.rpartition("/")[2].replace(".png", ".tif"), "their folders and suffixes"),
    ],
    ids=["spaces", "windows", "suffixes", "folders", "both"],
)
def test_ids_that_another_tool_spells_otherwise_are_matched_and_that_is_said(
    store: FeatureStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spell,  # type: ignore[no-untyped-def]
    said: str,
) -> None:
    order = np.random.default_rng(0).permutation(N)
    found = come_in(store, npz(tmp_path, VALUES[order], [spell(IDS[row]) for row in order]))
    np.testing.assert_array_equal(found, VALUES.astype(np.float16))
    assert said in capsys.readouterr().err


def test_ids_that_are_no_longer_unique_without_their_folders_are_not_matched(tmp_path: Path) -> None:
    ids = [f"{folder}/{row}.png" for folder in "ab" for row in range(N // 2)]
    store = make_store(tmp_path / "store", ids)
    said = refused(store, npz(tmp_path, VALUES, [id.rpartition("/")[2] for id in ids]))
    assert "12 patches have no embedding in it" in said
    assert "6 of its rows repeat an id" in said


def test_ids_read_as_numbers_are_told_from_ids_with_leading_zeros(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", [f"{row:04}" for row in range(N)])
    assert "Leading zeros seem to be lost" in refused(store, npz(tmp_path, VALUES, np.arange(N)))
    plain = make_store(tmp_path / "plain", [str(row) for row in range(N)])
    np.testing.assert_array_equal(come_in(plain, npz(tmp_path, VALUES, np.arange(N))), VALUES.astype(np.float16))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.array(IDS, dtype=object), "a pickle and is not read.*dtype=str"),
        (np.arange(N) / 2, "ids is float64"),
        (np.array([IDS, IDS]), "ids is .* expected one string per row"),
        (np.array([b"\xff" + bytes([row]) for row in range(N)]), "no UTF-8 text"),
    ],
    ids=["objects", "floats", "two columns", "bytes"],
)
def test_ids_of_other_types_are_refused_by_name(store: FeatureStore, tmp_path: Path, ids: object, message: str) -> None:
    said = refused(store, npz(tmp_path, VALUES, ids))
    assert re.search(message, said), said


def test_ids_may_be_bytes_or_a_column(store: FeatureStore, tmp_path: Path) -> None:
    for ids in (np.array([id.encode() for id in IDS]), np.array(IDS)[:, None]):
        np.testing.assert_array_equal(come_in(store, npz(tmp_path, VALUES, ids)), VALUES.astype(np.float16))
    for kind in (np.array([id.encode() for id in IDS]), np.array(IDS, dtype=object)):
        with h5py.File(tmp_path / "x.h5", "w") as file:
            file["embeddings"], file["ids"] = VALUES[None], kind
        np.testing.assert_array_equal(come_in(store, tmp_path / "x.h5"), VALUES.astype(np.float16))


def test_ids_apart_serve_any_file_without_its_own(
    store: FeatureStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(IDS).encode() + b"\r\n")  # as Windows saves it
    with h5py.File(tmp_path / "x.h5", "w") as file:  # a slide of CLAM's
        file["features"], file["coords"] = VALUES, np.zeros((N, 2), int)
    assert "holds coords, features; expected 'ids'" in refused(store, tmp_path / "x.h5")
    np.testing.assert_array_equal(come_in(store, tmp_path / "x.h5", tmp_path / "ids.txt"), VALUES.astype(np.float16))
    assert capsys.readouterr().err == ""  # not even the byte order mark was in the way
    with pytest.raises(UserError, match="holds its ids: leave out `ids`"):
        come_in(store, npz(tmp_path, VALUES), tmp_path / "ids.txt")


def test_other_files_are_refused_with_how_to_convert_them(store: FeatureStore, tmp_path: Path) -> None:
    (tmp_path / "x.csv").touch()
    said = refused(store, tmp_path / "x.csv")
    assert "pandas.read_csv(path)" in said
    assert "np.savez('x.npz', features=features, ids=np.array(ids, dtype=str))" in said
    np.save(tmp_path / "x", VALUES)
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    assert "it is a single array; name it .npy" in refused(store, tmp_path / "x.npz")
    npz(tmp_path, VALUES).rename(tmp_path / "x.npy")
    assert "it is an archive; name it .npz" in refused(store, tmp_path / "x.npy")
    sparse = anndata.AnnData(scipy.sparse.csr_matrix(VALUES), obs={"obs_names": IDS})
    sparse.write_h5ad(tmp_path / "x.h5ad")
    assert "its X is sparse" in refused(store, tmp_path / "x.h5ad")


# -------------------------------------------------------------------------------------------------------------- export


def go_out(store: FeatureStore, out: Path, format: str, dtype: str = "float32") -> Path:
    export_embeddings(
        store, "d", model="m", view="full", pooling="card", format=format, out=out / f"out.{format}", dtype=dtype
    )
    return out / f"out.{format}"


def test_code_written_for_clam_reads_an_export(store: FeatureStore, tmp_path: Path) -> None:
    """The lines that datasets of CLAM and TRIDENT consist of."""
    come_in(store, npz(tmp_path, VALUES))
    with h5py.File(go_out(store, tmp_path, "hdf5"), "r") as f:
        features = f["features"][:]
        coords = f["coords"][:]
    assert features.dtype == np.float32
    assert coords.dtype.kind == "i"
    assert coords.tolist() == [[256 * row, 64 * row] for row in range(N)]
    logits = torch.nn.Linear(D, 2)(torch.from_numpy(features))
    assert logits.shape == (N, 2)
    scipy.sparse.csr_matrix(features)
    assert np.linalg.svd(features, compute_uv=False).shape == (D,)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("format", "suffix"), [("hdf5", "h5"), ("npz", "npz"), ("anndata", "h5ad")])
def test_exports_come_back_exactly(store: FeatureStore, tmp_path: Path, format: str, suffix: str, dtype: str) -> None:
    stored = come_in(store, npz(tmp_path, VALUES))
    out = go_out(store, tmp_path, format, dtype).rename(tmp_path / f"out.{suffix}")
    np.testing.assert_array_equal(come_in(store, out), stored)
    if format == "anndata":
        data = anndata.read_h5ad(out)
        assert data.X.dtype == dtype
        assert data.obsm["spatial"][3].tolist() == [768, 192]
    if format == "npz":
        with np.load(out, allow_pickle=False) as file:
            assert file["features"].dtype == dtype
            assert file["coords"][3].tolist() == [768, 192]


@pytest.mark.parametrize(
    ("id", "position"),
    [
        ("s_x12_y34.png", [12, 34]),
        ("s [x=12,y=34,w=5,h=6].png", [12, 34]),
        ("s [d=4,x=12,y=34].png", [12, 34]),
        ("X12_Y34", [12, 34]),
        ("max12_y34.png", None),
        ("s_12_34.png", None),
        ("s_x12.5_y34.png", None),
        ("s_x-12_y34.png", None),
        ("s_x1_y2_x3_y4.png", None),
    ],
)
def test_positions_are_read_from_ids_that_hold_one(id: str, position: list[int] | None) -> None:
    found = coordinates(np.array([id]))
    assert (None if found is None else found[0].tolist()) == position


def test_positions_are_left_out_if_any_id_lacks_one_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = make_store(tmp_path / "store", [*IDS[:-1], "last.png"])
    come_in(store, npz(tmp_path, VALUES, [*IDS[:-1], "last.png"]))
    with h5py.File(go_out(store, tmp_path, "hdf5"), "r") as file:
        assert "coords" not in file
    assert "has no coords" in capsys.readouterr().err


def test_an_unknown_dtype_is_refused(store: FeatureStore, tmp_path: Path) -> None:
    come_in(store, npz(tmp_path, VALUES))
    with pytest.raises(UserError, match="unknown dtype 'float8': use float32 or float16"):
        go_out(store, tmp_path, "hdf5", "float8")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("folder", "it is a folder"),
        ("", "it is a folder"),
        ("-", "not written to stdout"),
        ("file/x.h5", "is a file and no folder"),
        ("file/deep/x.h5", "is a file and no folder"),
        ("/dev/null", "must not be replaced"),
        ("/dev/stdout", "must not be replaced"),
        ("/proc/self/fd/1", "must not be replaced"),
        ("/dev/none", "must not be replaced"),
        ("pipe", "must not be replaced"),
    ],
)
def test_an_output_that_is_no_file_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=message):
        check_output(Path(out))
    assert not (tmp_path / "file").is_dir()


def test_an_output_in_folders_that_are_yet_to_be_made_is_right(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "newer" / "x.h5")
    (tmp_path / "x.h5").write_text("older")
    check_output(tmp_path / "x.h5")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_in_a_folder_that_may_not_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir(mode=0o500)
    with pytest.raises(UserError, match="may not be written to"):
        check_output(tmp_path / "kept" / "x.h5")


def test_an_export_looks_at_its_output_before_it_reads(store: FeatureStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is a folder"):
        export_embeddings(store, "none", model="m", view="full", pooling="card", format="hdf5", out=tmp_path)
