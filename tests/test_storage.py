"""Is a store in a bucket the same store, byte for byte, whatever the network does and whoever writes beside it?"""

from __future__ import annotations

import http.server
import itertools
import json
import logging
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import killed_writer
import numpy as np
import processes
import pytest
import timm
import torch
import zarr
from PIL import Image
from safetensors.torch import save_file

from extract.cli import app as extract_app
from features import console, storage_bucket, storage_local
from features.cli import app as store_app
from features.console import UserError
from features.samples import make_samples
from features.storage import find_groups, find_storage
from features.storage_bucket import BucketStorage
from features.storage_local import LocalStorage
from features.store import FeatureStore
from probe.probing import ProbeOptions, probe_store
from probe.runs import read_run

obstore = pytest.importorskip("obstore", reason="needs obstore (pip install 'mitofm[s3]')")
moto = pytest.importorskip("moto.server", reason="needs moto[server]")

KEY, SECRET = "AKIAPLANTEDKEY", "planted/secret+words"
N = 150
_names = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server of buckets."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")).close()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(autouse=True)
def environment(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_SKIP_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))


@pytest.fixture
def url() -> str:
    return f"s3://bucket/some/where-{next(_names)}"


def objects(url: str) -> dict[str, bytes]:
    store = storage_bucket.connect(url)
    paths = [item["path"] for item in obstore.list(store).collect()]
    return {path: bytes(obstore.get(store, path).bytes()) for path in paths}


def call(app: object, *arguments: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a command that fails prints, all of it; it must be one message, without a secret."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as caught:
        console.run(app)  # type: ignore[arg-type]
    for number, handler in old.items():
        signal.signal(number, handler)
    captured = capsys.readouterr()
    printed = captured.out + captured.err
    assert caught.value.code == 1, printed
    assert printed.count("error: ") == 1
    assert "Traceback" not in printed
    assert not any(planted in printed for planted in (KEY, SECRET, "planted"))
    return printed


# What `--store` may say.


@pytest.mark.parametrize("where", ["embeddings.zarr", "/data/s3/x", Path("a/b"), "c:d"])
def test_a_path_is_a_folder(where: Path | str) -> None:
    assert find_storage(where) == LocalStorage(Path(where))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (Path("s3://bucket/prefix"), "has lost a slash"),
        ("ftp://host/x", "begins with ftp://"),
        ("s3://", "names no bucket"),
        ("s3://bucket/a//b", "empty part"),
        ("s3://bucket/../b", "empty part"),
        (f"s3://{KEY}:{SECRET}@bucket/x", "the bucket and the prefix alone"),
        (f"s3://bucket/x?X-Amz-Signature={SECRET}", "the bucket and the prefix alone"),
        (f"s3://[bucket/x?{SECRET}", "not an address"),
    ],
)
def test_an_address_that_is_none_is_refused_without_what_may_be_a_secret(where: Path | str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        find_storage(where)
    assert "planted" not in str(caught.value)
    assert KEY not in str(caught.value)


# The same store.


@pytest.fixture(scope="module")
def patches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("patches")
    rng = np.random.default_rng(0)
    for row in range(N):
        path = folder / ("Atypical" if row % 3 == 0 else "Normal") / f"é{row:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return path


def extraction(patches: Path, weights: Path, where: object) -> list[str]:
    options = f"--model timm/test_vit --view full,center16 --precision fp32 --device cpu --weights {weights}"
    return [*options.split(), "--dataset", str(patches), "--store", str(where)]


@pytest.fixture(scope="module")
def local(patches: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed extraction to a folder."""
    folder = tmp_path_factory.mktemp("local") / "store"
    extract_app(extraction(patches, weights, folder), standalone_mode=False)
    return killed_writer.tree(folder)


def test_extraction_to_a_bucket_gives_the_bytes_of_the_local_one(
    patches: Path, weights: Path, local: dict[str, bytes], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    extract_app([*extraction(patches, weights, url), "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["store"] == url
    assert objects(url) == local
    store_app(["verify", "--store", url], standalone_mode=False)
    assert f"{url} is sound" in capsys.readouterr().err
    opened = zarr.open(zarr.storage.ObjectStore(storage_bucket.connect(url), read_only=True), mode="r")
    entry = FeatureStore.open(url).entries()[0]
    assert opened[f"{entry.key}/cls"].shape == (N, entry.poolings["cls"])
    extract_app(extraction(patches, weights, url), standalone_mode=False)
    assert "all 150 patches were already in the store" in capsys.readouterr().err
    assert objects(url) == local


def test_extraction_killed_midway_and_run_again_gives_the_same(
    patches: Path, weights: Path, local: dict[str, bytes], url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    done = "import os, signal, sys, obstore; from extract.cli import app; put = obstore.put; n = []\n"
    done += "def killed(store, path, *a, **k):\n    n.append(path.endswith('.0'))\n"
    done += (
        "    os.kill(os.getpid(), signal.SIGKILL) if sum(n) == 9 + 8 else put(store, path, *a, **k)\n"  # 7: the table
    )
    done += "obstore.put = killed; app(sys.argv[1:])"
    assert processes.run("-c", done, *extraction(patches, weights, url)).returncode == -signal.SIGKILL
    left = objects(url)
    assert left.items() < local.items()
    assert 0 < sum("timm" in key and key.endswith(".0") for key in left) < 18
    extract_app(extraction(patches, weights, url), standalone_mode=False)
    assert objects(url) == local


def test_a_writer_killed_before_any_request_leaves_a_store_that_the_next_run_finishes(tmp_path: Path, url: str) -> None:
    script = Path(__file__).parent / "killed_bucket_writer.py"
    done = processes.run(script, url, 13)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stores identical" in done.stdout


def test_probes_of_a_bucket_are_those_of_a_folder_and_fetch_every_block_once(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    label = (np.arange(240) % 3 == 0).astype(int).tolist()
    table = make_samples(
        [f"{row}.png" for row in range(240)],
        label,
        group=[f"slide {row // 8}" for row in range(240)],
        split=["test" if row // 8 % 4 == 0 else "train" for row in range(240)],
        sha256=[str(row) for row in range(240)],
    )
    values = rng.standard_normal((240, 6)) + 2.0 * np.array(label)[:, None]
    for where in (url, tmp_path / "store"):
        store = FeatureStore.open_or_create(where)
        store.put_samples("data", table, attrs={})
        poolings = {"cls": 6, "mean": 6}
        writer = store.begin("data", model="model", view="full", poolings=poolings, card_pooling="cls+mean", parts={})
        for rows in writer.missing():
            part = values[rows.start : rows.stop]
            writer.write(rows, {"cls": part, "mean": part**2})
    fetched = []
    read = BucketStorage.read
    monkeypatch.setattr(BucketStorage, "read", lambda self, key: fetched.append(key) or read(self, key))
    results = []
    for where in (url, tmp_path / "store"):
        (record,) = probe_store(FeatureStore.open(where), options=ProbeOptions(), runs=tmp_path / "runs")
        results.append(read_run(record.folder))
    assert [run.store for run in results] == [url, str(tmp_path / "store")]
    assert results[0].metrics == results[1].metrics
    blocks = [key for key in fetched if re.search(r"c\.\d+\.0$", key) and "samples" not in key]
    assert len(blocks) == len(set(blocks)) == 8


def test_embeddings_leave_a_bucket_and_come_into_one(url: str, tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("id,label\n" + "".join(f"{row}.png,{row % 2}\n" for row in range(N)))
    values = np.arange(N * 4, dtype=np.float32).reshape(N, 4)
    np.savez(tmp_path / "in.npz", features=values, ids=np.array([f"{row}.png" for row in range(N)]))
    into = ["--dataset", "mine", "--model", "theirs", "--store", url]
    store_app(
        ["import", str(tmp_path / "in.npz"), *into, "--table", str(tmp_path / "table.csv")], standalone_mode=False
    )
    store_app(["export", *into, "--out", str(tmp_path / "out.npz"), "--format", "npz"], standalone_mode=False)
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_array_equal(out["features"], values)
    store_app(["info", "--store", url], standalone_mode=False)


def test_large_objects_travel_in_parts(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_bucket, "_MOST_PER_REQUEST", 5 * 2**20)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((64, 50_000)).astype(np.float16)  # 6.4 MB
    store = FeatureStore.open_or_create(url)
    store.put_samples("d", make_samples(list(map(str, range(64))), [0] * 64, sha256=[""] * 64), attrs={})
    writer = store.begin("d", model="m", view="v", poolings={"cls": 50_000}, card_pooling="cls", parts={})
    writer.write(range(64), {"cls": values})
    np.testing.assert_array_equal(FeatureStore.open(url).read("d", model="m", view="v"), values)


# Damage.


def filled(where: Path | str, scale: int = 1) -> FeatureStore:
    killed_writer.write(where, scale)  # type: ignore[arg-type]
    return FeatureStore.open(where)


def test_damage_in_a_bucket_is_named_and_a_replaced_object_is_checked_again(url: str) -> None:
    store = filled(url)
    store.read("data", model="model", view="full")
    key = store.entries()[0].block_key("cls", 1)
    data = bytearray(store.storage.read(key))
    data[77] ^= 4
    store.storage.write(key, [bytes(data)])
    with pytest.raises(UserError, match=rf"block 1 \(rows 64–127\).*checksum.*{url}/{key}"):
        store.read("data", model="model", view="full")
    assert [problem.block for problem in store.verify()] == [1]
    store.storage.remove(key)
    with pytest.raises(UserError, match=r"block 1 .*cannot be read"):
        store.read("data", model="model", view="full")
    store.storage.remove(store.entries()[0].block_key("mean", 1))  # the remedy
    filled(url)
    assert store.verify() == []


def test_remove_and_overwrite_leave_nothing_behind(url: str, tmp_path: Path) -> None:
    store = filled(url)
    killed_writer.rewrite(url)  # type: ignore[arg-type]
    killed_writer.write(tmp_path / "local")
    killed_writer.rewrite(tmp_path / "local")
    assert objects(url) == killed_writer.tree(tmp_path / "local")
    store.remove("data", model="model")
    assert store.entries() == []
    store.remove("data")
    assert list(objects(url)) == ["zarr.json"]


def test_something_else_in_the_place_is_left_alone(url: str) -> None:
    find_storage(f"{url}/below").write("notes.txt", [b"mine"])
    with pytest.raises(UserError, match=r"not a feature store \(it has no zarr"):
        FeatureStore.open(url)
    with pytest.raises(UserError, match="nothing was changed"):
        FeatureStore.open_or_create(url)
    assert list(objects(url)) == ["below/notes.txt"]


# Several writers.


def test_only_one_writer_at_a_time_changes_folders_and_a_killed_ones_lock_runs_out(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage_bucket, "_LEASE", 0.3)
    store = filled(url)
    inside = []

    def change(number: int) -> None:
        with find_storage(url).lock():
            inside.append(number)
            assert len(inside) == 1
            time.sleep(0.05)
            inside.remove(number)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.storage.write(storage_bucket._LOCK, [b"of one that was killed"])
    with store.storage.lock():
        assert store.storage.read(storage_bucket._LOCK) != b"of one that was killed"
    assert "waiting for another writer" in capsys.readouterr().err
    assert storage_bucket._LOCK not in objects(url)


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_the_first_of_several_to_add_a_folder_stays_and_needs_no_lock(
    kind: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = find_storage(url if kind == "bucket" else tmp_path)
    flush, content, others = storage_local.flush, BucketStorage._put_content, []

    def overtaken() -> None:
        if not others:
            others.append(None)
            there.put_folder("a", {"x/zarr.json": [b"x"], "zarr.json": [b"first"]})

    monkeypatch.setattr(storage_local, "flush", lambda path: (overtaken(), flush(path)))
    monkeypatch.setattr(BucketStorage, "_put_content", lambda *a: (overtaken(), content(*a)))
    for _ in range(2):
        there.put_folder("a", {"x/zarr.json": [b"x"], "zarr.json": [b"second"]})
        assert others
        assert there.read("a/zarr.json") == b"first"
    assert find_groups(there, "") == list(there.list_folder("")) == ["a"]


def test_what_a_killed_writer_left_of_a_folder_never_becomes_part_of_a_new_one(url: str) -> None:
    there = find_storage(url)
    for key in ("a/cls/c.0.0", "a/cls/zarr.json", "ab/cls/c.0.0"):
        there.write(key, [b"old"])
    there.put_folder("a", {"cls/zarr.json": [b"new"], "zarr.json": [b"new"]})
    assert objects(url) == {"a/cls/zarr.json": b"new", "a/zarr.json": b"new", "ab/cls/c.0.0": b"old"}


def test_shares_in_any_order_and_without_locks_write_the_bucket_of_one(
    patches: Path, weights: Path, local: dict[str, bytes], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BucketStorage, "_take_lock", lambda self, token: False)
    for rank in (1, 0):
        extract_app([*extraction(patches, weights, url), "--shard", f"{rank}/2"], standalone_mode=False)
    assert objects(url) == local


def test_a_writer_whose_entry_was_replaced_stops_and_takes_its_block_back(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(url)
    poolings = {"cls": killed_writer.WIDTH, "mean": killed_writer.WIDTH}
    options = {"poolings": poolings, "card_pooling": "cls", "overwrite": True}
    slow = FeatureStore.open(url).begin("data", model="model", view="full", parts={"who": "slow"}, **options)
    block = dict.fromkeys(poolings, killed_writer.VALUES[:64])
    put, others = BucketStorage.write, []

    def overtaken(self: BucketStorage, key: str, pieces: storage_bucket.Pieces) -> None:
        if key.endswith("mean/c.0.0") and not others:
            others.append(None)
            store = FeatureStore.open(url)
            others[0] = store.begin("data", model="model", view="full", parts={"who": "fast"}, **options)
        put(self, key, pieces)

    monkeypatch.setattr(BucketStorage, "write", overtaken)
    with pytest.raises(UserError, match="replaced by another process"):
        slow.write(range(64), block)
    assert others[0].entry.missing_blocks() == [0, 1, 2]
    others[0].write(range(64), block)
    with pytest.raises(UserError, match="replaced by another process"):
        slow.write(range(64, 128), dict.fromkeys(poolings, killed_writer.VALUES[64:128]))
    assert others[0].entry.missing_blocks() == [1, 2]


# The network.


class Proxy:
    """Passes bytes on to a server, and cuts a connection once `judge(how many bytes came from the client)` says so."""

    def __init__(self, target: str, judge: Callable[[int, int], bool]) -> None:
        host, port = target.removeprefix("http://").split(":")
        self.target, self.judge, self.cuts = (host, int(port)), judge, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.count = 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            self.count += 1
            upstream = socket.create_connection(self.target)
            pair = (client, upstream)
            passed = [0]
            for a, b in (pair, pair[::-1]):
                threading.Thread(target=self.pump, args=(a, b, self.count, passed, pair), daemon=True).start()

    def pump(self, a: socket.socket, b: socket.socket, number: int, passed: list[int], pair: tuple) -> None:  # type: ignore[type-arg]
        try:
            while data := a.recv(512):
                passed[0] += len(data)
                if self.judge(number, passed[0]):
                    self.cuts += 1
                    break
                b.sendall(data)
        except OSError:
            pass
        for end in pair:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self.listener.close()


def test_connections_cut_midway_lose_nothing(
    server: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_writer.write(tmp_path / "local")
    proxy = Proxy(server, lambda number, n_bytes: number % 3 == 0 and n_bytes > 100 + 600 * (number % 2))
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    store = filled(url)
    values = store.read("data", model="model", view="full", pooling="cls+mean")
    cuts = proxy.cuts
    proxy.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    assert cuts > 5
    assert objects(url) == killed_writer.tree(tmp_path / "local")
    np.testing.assert_array_equal(values, np.concatenate([killed_writer.VALUES, -killed_writer.VALUES], axis=1))


def test_a_network_that_stays_away_ends_in_one_message_and_the_same_command_goes_on(
    server: str,
    patches: Path,
    weights: Path,
    local: dict[str, bytes],
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(storage_bucket, "_RETRIES", {"max_retries": 1})
    proxy = Proxy(server, lambda number, n_bytes: False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    put, blocks = BucketStorage.write, []

    def away(self: BucketStorage, key: str, pieces: storage_bucket.Pieces) -> None:
        blocks.extend([key] * ("timm" in key and key.endswith(".0")))
        if len(blocks) == 5:
            proxy.judge = lambda number, n_bytes: True
        put(self, key, pieces)

    monkeypatch.setattr(BucketStorage, "write", away)
    printed = call(extract_app, *extraction(patches, weights, url), capsys=capsys, monkeypatch=monkeypatch)
    assert "does not answer. Everything written so far is kept: look at the network" in printed
    proxy.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    left = {key: data for key, data in objects(url).items() if key != storage_bucket._LOCK}
    assert left.items() < local.items()
    assert sum("timm" in key and key.endswith(".0") for key in left) == 4
    extract_app(extraction(patches, weights, url), standalone_mode=False)
    assert objects(url) == local
    for verb in ("verify", "info"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        printed = call(store_app, verb, "--store", url, capsys=capsys, monkeypatch=monkeypatch)
        assert "does not answer" in printed


# Refusals: one message each, without any secret.


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers every request with a refusal that echoes the keys, as real servers do."""

    status, code = 403, "AccessDenied"

    def do_GET(self) -> None:
        body = f"<Error><Code>{self.code}</Code><Message>{KEY} {SECRET}</Message></Error>".encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "AccessDenied", "access was refused"),
        (403, "SignatureDoesNotMatch", "check AWS_PROFILE"),
        (400, "ExpiredToken", "access was refused"),
        (400, "AuthorizationHeaderMalformed", "set AWS_REGION"),
        (404, "NoSuchBucket", "s3://bucket does not exist"),
        (400, "InvalidBucketName", "the server refused"),
        (503, "SlowDown", "cannot"),
    ],
)
def test_a_refusal_is_one_message_without_a_secret(
    url: str,
    status: int,
    code: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    patches: Path,
    weights: Path,
) -> None:
    handler = type("Handler", (Refusing,), {"status": status, "code": code})
    monkeypatch.setattr(storage_bucket, "_RETRIES", {"max_retries": 1})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as refusing:
        threading.Thread(target=refusing.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{refusing.server_port}")
        for app, arguments in (
            (store_app, ["info", "--store", url]),
            (extract_app, extraction(patches, weights, url)),
        ):
            printed = call(app, *arguments, capsys=capsys, monkeypatch=monkeypatch)
            assert message in printed
        refusing.shutdown()


def test_a_bucket_that_does_not_exist_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], patches: Path, weights: Path
) -> None:
    for app, arguments in (
        (store_app, ["info", "--store", "s3://no-such-bucket/x"]),
        (extract_app, extraction(patches, weights, "s3://no-such-bucket/x")),
    ):
        printed = call(app, *arguments, capsys=capsys, monkeypatch=monkeypatch)
        assert "s3://no-such-bucket does not exist (NoSuchBucket)" in printed


def test_without_credentials_the_ways_to_give_them_are_named(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    printed = call(store_app, "info", "--store", url, capsys=capsys, monkeypatch=monkeypatch)
    assert "no credentials for" in printed
    assert "AWS_PROFILE, or AWS_ACCESS_KEY_ID" in printed
    monkeypatch.setenv("AWS_PROFILE", "absent")
    printed = call(store_app, "info", "--store", url, capsys=capsys, monkeypatch=monkeypatch)
    assert "ProfileNotFound" in printed


def test_a_profile_gives_credentials_and_the_endpoint(
    server: str, url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    filled(url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-east-1\nendpoint_url = {server}\n")
    monkeypatch.setenv("AWS_PROFILE", "lab")
    assert FeatureStore.open(url).datasets() == ["data"]


def test_without_obstore_the_way_to_install_it_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "features.storage_bucket")
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UserError, match=r"pip install 'mitofm\[s3\]'"):
        FeatureStore.open(url)


# The lock, and the order of changes.


def lock_of(url: str) -> list[str]:
    """The objects that keep others out; their names end like those of all unfinished work."""
    return [key for key in objects(url) if key.endswith(".partial")]


def test_a_lock_that_another_writer_has_taken_over_is_left_to_it(url: str) -> None:
    there = find_storage(url)
    with there.lock():
        (lock,) = lock_of(url)
        there.write(lock, [b"of another writer, after this one was thought dead"])
    assert objects(url) == {lock: b"of another writer, after this one was thought dead"}
    there.remove(lock)
    with pytest.raises(RuntimeError), there.lock():
        raise RuntimeError  # gives its own lock back all the same
    assert lock_of(url) == []


@pytest.mark.parametrize("overtaken", [True, False])
def test_of_several_that_find_the_same_dead_lock_only_one_takes_it_over(
    url: str, monkeypatch: pytest.MonkeyPatch, overtaken: bool
) -> None:
    """Another writer is quicker by one request; its lock then runs out in turn."""
    clock(monkeypatch)
    there, put = find_storage(url), obstore.put
    with there.lock():
        (lock,) = lock_of(url)
    there.write(lock, [b"of one that was killed"])
    found = []

    def slower(store: object, key: str, data: bytes, **options: object) -> object:
        if key == lock and options.get("mode") != "create":
            found.append(bytes(obstore.get(store, key).bytes()))
            if overtaken and len(found) == 1:
                put(store, key, b"of the quicker one")
        return put(store, key, data, **options)

    monkeypatch.setattr(obstore, "put", slower)
    with there.lock() as locked:
        assert locked
        assert objects(url)[lock] not in (b"of one that was killed", b"of the quicker one")
    assert found == [b"of one that was killed", b"of the quicker one"][: 1 + overtaken]
    assert lock_of(url) == []


def test_a_lock_that_changes_hands_is_waited_for_anew(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as others come and go they are alive, however long it takes together; the last of them is killed."""
    slept = clock(monkeypatch)
    there, get, looked = find_storage(url), obstore.get, []
    with there.lock():
        (lock,) = lock_of(url)
    there.write(lock, [b"0"])

    def seen(store: object, key: str, **options: object) -> object:
        result = get(store, key, **options)
        if key == lock:
            looked.append(sum(slept))
            if len(looked) < 12:
                obstore.put(store, key, str(len(looked)).encode())  # the next of them holds it now
        return result

    monkeypatch.setattr(obstore, "get", seen)
    with there.lock():
        waited = sum(slept) - looked[11]  # since the last one was seen for the first time
        assert waited > storage_bucket._LEASE
        assert waited < 2 * storage_bucket._LEASE


def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time passes only where it is slept; the naps so far."""
    slept: list[float] = []
    told = SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append)
    monkeypatch.setattr(storage_bucket, "time", told)
    monkeypatch.setattr(storage_bucket, "_LEASE", 2.0)
    return slept


def changes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every object that is put or deleted from now on, in order, but for the lock."""
    found: list[tuple[str, str]] = []
    put, delete = obstore.put, obstore.delete

    def noted_put(store: object, key: str, *given: object, **options: object) -> object:
        result = put(store, key, *given, **options)
        found.append(("put", key))
        return result

    def noted_delete(store: object, keys: list[str]) -> object:
        found.extend(("delete", key) for key in keys)
        assert len(keys) == 1 or not [key for key in keys if key.endswith("zarr.json")]  # of many none is the first
        return delete(store, keys)

    monkeypatch.setattr(obstore, "put", noted_put)
    monkeypatch.setattr(obstore, "delete", noted_delete)
    return found


def without_lock(found: list[tuple[str, str]], what: str) -> list[str]:
    return [key for kind, key in found if kind == what and not key.endswith(".partial")]


@pytest.mark.parametrize("names", [("data",), ("data", "model"), ("data", "model", "full")])
def test_what_makes_a_folder_count_is_deleted_before_its_content_outer_folders_first(
    url: str, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    store = filled(url)
    below = {key for key in objects(url) if key.startswith("/".join(names) + "/")}
    found = changes(monkeypatch)
    store.remove(names[0], **dict(zip(("model", "view"), names[1:], strict=False)))
    deleted = without_lock(found, "delete")
    assert sorted(deleted) == sorted(below)
    assert deleted[0] == "/".join(names) + "/zarr.json"
    n_groups = sum(key.endswith("zarr.json") for key in deleted)
    assert all(key.endswith("zarr.json") for key in deleted[:n_groups])
    depths = [key.count("/") for key in deleted[:n_groups]]
    assert depths == sorted(depths)
    assert len(set(depths)) > 1


def test_what_makes_a_folder_count_is_put_after_its_content(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = changes(monkeypatch)
    killed_writer.write(url)  # type: ignore[arg-type]
    new = without_lock(found, "put")
    for folder in ("data", "data/model/full"):
        inside = [key for key in new if key.startswith(f"{folder}/")]
        made = inside.index(f"{folder}/zarr.json")
        content = {f"{folder}/{name}" for name in killed_writer_content(url, folder)}
        assert content
        assert content <= set(inside[:made])
    del found[:]
    killed_writer.rewrite(url)  # type: ignore[arg-type]
    for folder in ("data/model/full", "data/samples"):
        inside = [(kind, key) for kind, key in found if key.startswith(f"{folder}/") and not key.endswith(".0")]
        assert inside[0] == ("delete", f"{folder}/zarr.json")  # the old one goes before anything of it
        puts = [key for kind, key in inside if kind == "put"]
        assert len(puts) > 2
        assert puts[-1] == f"{folder}/zarr.json"


def killed_writer_content(url: str, folder: str) -> list[str]:
    """What belongs to a folder from its beginning: tables and arrays, but no blocks, and no other folders."""
    inside = [key.removeprefix(f"{folder}/") for key in objects(url) if key.startswith(f"{folder}/")]
    if folder == "data":
        return [key for key in inside if key.startswith("samples/")]
    return [key for key in inside if key.endswith("/zarr.json")]
