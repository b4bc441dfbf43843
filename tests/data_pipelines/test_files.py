"""Reading files: what ends a read, what it is counted under, and how patient remote reads are."""

from __future__ import annotations

import builtins
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_pipelines import files
from data_pipelines.files import Remote, expand, open_file, read_bytes, signature
from data_pipelines.records import BadRecord, Cause
from tests.data_pipelines.servers import Server, serve


@pytest.fixture(autouse=True)
def remote(monkeypatch: pytest.MonkeyPatch) -> Remote:
    """Soon again, and with time to answer: this machine may be busy."""
    monkeypatch.setattr(files, "_default", policy := Remote(timeout=5.0, retries=2, backoff=0.01))
    return policy


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "a.bin").write_bytes(bytes(range(100)))
    (tmp_path / "empty.bin").write_bytes(b"")
    with serve(tmp_path) as server:
        yield server


@pytest.fixture
def bucket() -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    with fs.open("/bucket/a.bin", "wb") as file:
        file.write(bytes(range(100)))
    with fs.open("/bucket/empty.bin", "wb"):
        pass
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def cause_of(path: str | Path, **settings: Any) -> Cause:
    with pytest.raises(BadRecord) as error:
        read_bytes(path, **settings)
    assert str(error.value).removeprefix("'").startswith(str(path)[:1])
    return error.value.cause


def test_a_file_is_read_whole_and_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"0123456789")
    assert read_bytes(path) == read_bytes(path, limit=10) == read_bytes(f"file://{path}") == b"0123456789"
    assert read_bytes(path, start=3, end=7) == b"3456"
    assert read_bytes(path, start=3) == b"3456789"
    with pytest.raises(BadRecord, match=r"a\.bin ends at byte 10; expected 12 bytes") as error:
        read_bytes(path, start=3, end=12)
    assert error.value.cause is Cause.STORE


def test_what_is_no_file_has_its_cause_and_never_waits(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
    assert cause_of(tmp_path / "empty") is Cause.EMPTY
    for name in ("circle", "pipe", "socket", "."):
        assert cause_of(tmp_path / name) is Cause.NOT_A_FILE
    assert cause_of("/dev/zero") is Cause.NOT_A_FILE
    for name in ("missing", "nowhere", "empty/below", "x" * 5000):
        assert cause_of(tmp_path / name) is Cause.MISSING
    for name in ("zero\0byte", "half\ud800"):
        assert cause_of(f"{tmp_path}/{name}") is Cause.VALUE


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"secret")

    def refuse(*_: Any) -> int:  # root may read everything
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    assert cause_of(tmp_path / "a") is Cause.PERMISSION


def test_a_disk_that_fails_is_a_bad_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"gone")

    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "open", fail)
    assert cause_of(tmp_path / "a") is Cause.REMOTE


def test_no_more_is_read_than_the_limit(tmp_path: Path, server: Server, bucket: str) -> None:
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)  # takes no space
    for path in (tmp_path / "huge", f"{server.url}/plain/a.bin", f"{bucket}/a.bin"):
        assert cause_of(path, limit=99) is Cause.TOO_LARGE
        assert cause_of(path, start=0, end=100, limit=99) is Cause.TOO_LARGE
    assert len(read_bytes(f"{server.url}/plain/a.bin", limit=100)) == 100
    assert len(read_bytes(f"{bucket}/a.bin", limit=100)) == 100


def test_addresses_are_read_whole_and_in_parts(server: Server, bucket: str) -> None:
    for folder in (f"{server.url}/plain", bucket):
        assert read_bytes(f"{folder}/a.bin") == bytes(range(100))
        assert read_bytes(f"{folder}/a.bin", start=10, end=20) == bytes(range(10, 20))
        assert cause_of(f"{folder}/a.bin", start=90, end=120) is Cause.STORE
        assert cause_of(f"{folder}/a.bin", start=100, end=120) is Cause.STORE
        assert cause_of(f"{folder}/empty.bin") is Cause.EMPTY
        assert cause_of(f"{folder}/none.bin") is Cause.MISSING
        with open_file(f"{folder}/a.bin") as file:
            assert file.read(3) == b"\0\1\2"
            assert file.seek(-2, os.SEEK_END) == 98
            assert file.read() == b"\x62\x63"


def test_threads_read_at_the_same_time(server: Server) -> None:
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda i: read_bytes(f"{server.url}/plain/a.bin", start=i, end=i + 1), list(range(100)) * 2)
        assert b"".join(parts) == bytes(range(100)) * 2


def test_a_server_that_fails_twice_is_asked_again(server: Server) -> None:
    assert read_bytes(f"{server.url}/flaky/a.bin") == bytes(range(100))
    assert server.asked["/flaky/a.bin"] == 3


@pytest.mark.parametrize(
    ("status", "cause", "attempts"),
    [
        (503, Cause.REMOTE, 3),
        (429, Cause.REMOTE, 3),
        (404, Cause.MISSING, 1),
        (403, Cause.PERMISSION, 1),
        (400, Cause.REMOTE, 1),
    ],
)
def test_answers_of_a_server(server: Server, status: int, cause: Cause, attempts: int) -> None:
    assert cause_of(f"{server.url}/status/{status}/a.bin") is cause
    assert server.asked[f"/status/{status}/a.bin"] == attempts


def test_a_server_that_hangs_is_left(server: Server) -> None:
    files.set_default(Remote(timeout=0.2, retries=2, backoff=0.01))
    with pytest.raises(BadRecord, match=r"hang/a\.bin cannot be read after 3 attempts, .*no answer in 0\.2 s") as error:
        read_bytes(f"{server.url}/hang/a.bin")
    assert error.value.cause is Cause.TIMEOUT
    assert server.asked["/hang/a.bin"] == 3


def test_waits_double(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    files.set_default(Remote(timeout=5, retries=4, backoff=1.0))
    assert cause_of(f"{server.url}/status/500/a.bin") is Cause.REMOTE
    assert len(waits) == 4
    assert all(0.5 * 2**i <= wait <= 1.5 * 2**i for i, wait in enumerate(waits))


def test_nobody_there_is_a_remote_error_that_says_why() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/a.bin"
        with pytest.raises(BadRecord, match=r"after 3 attempts, the last one: Client\w+: Cannot connect") as error:
            read_bytes(address)
        assert error.value.cause is Cause.REMOTE
        files.set_default(Remote(retries=0))
        with pytest.raises(BadRecord, match="after one attempt, "):
            read_bytes(address)


def test_what_is_no_address() -> None:
    assert cause_of("nothing://a/b.jpg") is Cause.VALUE
    assert cause_of("http:///b.jpg") is Cause.VALUE


def test_a_server_without_parts_says_so(server: Server) -> None:
    assert len(read_bytes(f"{server.url}/whole/a.bin")) == 100
    with pytest.raises(BadRecord, match="gives no parts of files; copy it"):
        read_bytes(f"{server.url}/whole/a.bin", start=1, end=3)


def test_without_fsspec_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "fsspec":
            raise ModuleNotFoundError("No module named 'fsspec'", name="fsspec")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"gs://b/a\.jpg is remote: .*svg_jax\[remote\].*fsspec"):
        read_bytes("gs://b/a.jpg")


@pytest.mark.parametrize(
    "setting", [{"timeout": 0}, {"retries": -1}, {"retries": 10**12}, {"backoff": -1.0}, {"timeout": float("nan")}]
)
def test_a_policy_that_does_not_work_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is no way to read"):
        Remote(**setting)


def test_the_signature_follows_the_content(tmp_path: Path, server: Server, bucket: str) -> None:
    for path in (str(tmp_path / "a.bin"), f"{server.url}/plain/a.bin", f"{bucket}/a.bin"):
        before = signature(path)
        assert before == signature(path)
        with fsspec.open(str(tmp_path / "a.bin") if path.startswith("http") else path, "wb") as file:
            file.write(path.encode())
        assert signature(path) != before
    with pytest.raises(BadRecord, match="does not exist"):
        signature(f"{bucket}/none.bin")


def test_patterns(tmp_path: Path, bucket: str) -> None:
    for name in ("b-01.tar", "b-00.tar", "c.txt"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/*.tar") == [f"{tmp_path}/b-00.tar", f"{tmp_path}/b-01.tar"]
    assert expand(f"{tmp_path}/b-{{00..02}}.tar") == [f"{tmp_path}/b-0{i}.tar" for i in range(3)]
    assert expand("http://x/{8..10}.tar") == ["http://x/8.tar", "http://x/9.tar", "http://x/10.tar"]
    assert expand(f"{bucket}/*.bin") == [f"{bucket}/a.bin", f"{bucket}/empty.bin"]
    assert expand(f"{tmp_path}/none*") == []


@pytest.mark.parametrize("numbers", ["{0..99999999}", "{0..999999}{0..9}", "{000000..1000000}"])
def test_a_pattern_that_counts_too_far_is_refused_at_once(numbers: str) -> None:
    with pytest.raises(ValueError, match=r"the pattern x\{.* counts \d+ files; expected at most 1000000"):
        expand(f"x{numbers}.tar")
