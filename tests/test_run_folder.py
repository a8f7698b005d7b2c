"""A run's journals and files, before and after a crash."""

import json
import resource
import signal
from pathlib import Path

import pytest

from aclip.errors import ConfigError
from aclip.files import write_atomically
from aclip.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "runs" / "first")
    made.create()
    return made


def test_refuses_a_folder_that_holds_a_run(folder: RunFolder) -> None:
    folder.create()  # an empty folder may be used
    folder.write_json("config.json", {})
    with pytest.raises(ConfigError, match="already holds a run: continue it with --resume"):
        folder.create()


def test_says_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot make the run folder .*file/run"):
        RunFolder(tmp_path / "file" / "run").create()


def test_names_of_its_parts(folder: RunFolder) -> None:
    parts = (folder.checkpoints, folder.final, folder.best, folder.snapshots)
    assert [p.relative_to(folder.path).as_posix() for p in parts] == [
        "checkpoints",
        "final",
        "best",
        "snapshots",
    ]


RECORD = {
    "step": 3,
    "reason": 'über\u2028\x85 \n "quoted" \U0001f600',
    "value": 1e-7,
    "nested": {"a": [1, None]},
}


def test_records_come_back(folder: RunFolder) -> None:
    folder.write_json("config.json", RECORD)
    assert folder.read_json("config.json") == RECORD
    for step in range(3):
        folder.append("metrics", {**RECORD, "step": step})
    assert list(folder.records("metrics")) == [{**RECORD, "step": step} for step in range(3)]
    assert list(folder.records("evaluations")) == []


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 4', "5", '"text"', "", "\x00\x00", b"\xff\xfe"])
def test_a_torn_last_line_is_left_out_and_rewound(folder: RunFolder, torn: str | bytes) -> None:
    for step in (1, 2, 3):
        folder.append("metrics", {"step": step})
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(torn if isinstance(torn, bytes) else torn.encode())
    assert [r["step"] for r in folder.records("metrics")] == [1, 2, 3]
    folder.rewind(3)
    folder.append("metrics", {"step": 4})
    assert [r["step"] for r in folder.records("metrics")] == [1, 2, 3, 4]


def test_rewind_drops_later_steps_of_every_journal(folder: RunFolder) -> None:
    for journal in RunFolder.JOURNALS:
        for step in (1, 2, 3, 4):
            folder.append(journal, {**RECORD, "step": step})
    folder.append("skipped", {"key": "before the first step"})
    folder.rewind(2)
    for journal in RunFolder.JOURNALS:
        assert [r["step"] for r in folder.records(journal) if "step" in r] == [1, 2]
    assert folder.records("skipped")[0] == {**RECORD, "step": 1}
    assert len(list(folder.records("skipped"))) == 3
    assert not list(folder.path.glob(".*"))


def test_every_line_of_a_journal_is_json(folder: RunFolder) -> None:
    folder.append("metrics", RECORD)
    folder.append("metrics", RECORD)
    lines = (folder.path / "metrics.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [RECORD, RECORD]
    assert lines[-1] == b""


def test_reading_names_what_is_wrong(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match=r"is not a run folder: it has no config\.json"):
        folder.read_json("config.json")
    (folder.path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        folder.read_json("config.json")


def test_a_killed_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    write_atomically(path, "old")

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_the_last_record_is_read_from_the_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.last("metrics") == {}
    for step in range(1000):
        folder.append("metrics", {"step": step, "note": "x" * 50})
    assert folder.last("metrics")["step"] == 999
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"step": 10')
    assert folder.last("metrics")["step"] == 999
    (tmp_path / "metrics.jsonl").write_text("{")
    assert folder.last("metrics") == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk here")
def test_on_a_full_disk_lines_wait(folder: RunFolder, caplog: pytest.LogCaptureFixture) -> None:
    path = folder.path / "metrics.jsonl"
    folder.append("metrics", {"step": 1})
    kept = path.read_bytes()
    with folder.patient():
        path.unlink()
        path.symlink_to("/dev/full")
        for step in (2, 3):
            folder.append("metrics", {"step": step})
        path.unlink()
        path.write_bytes(kept)
        folder.append("metrics", {"step": 4})
    assert [r["step"] for r in folder.records("metrics")] == [1, 2, 3, 4]
    assert caplog.text.count("No space left on device") == 1

    path.unlink()
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):  # nobody waits: a command that writes its result and ends
        folder.append("metrics", {"step": 5})
    with pytest.raises(OSError, match="No space left"), folder.patient():  # or to the end in vain
        folder.append("metrics", {"step": 6})


def test_half_a_line_on_a_full_disk_is_taken_back(folder: RunFolder) -> None:
    """A limit on the size of files stops writing in the middle of a line, as a disk does that becomes full."""
    folder.append("metrics", {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with folder.patient():
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((folder.path / "metrics.jsonl").stat().st_size + 5, limits[1]))
            folder.append("metrics", {"step": 2})
            assert [r["step"] for r in folder.records("metrics")] == [1]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        folder.append("metrics", {"step": 3})
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_an_evaluation_that_is_owed_is_dropped(folder: RunFolder) -> None:
    for journal in RunFolder.JOURNALS:
        for step in (1, 2, 3):
            folder.append(journal, {"step": step})
    folder.append("incidents", {"step": 3})
    folder.rewind(2, evaluated=False)
    steps = {journal: [r["step"] for r in folder.records(journal)] for journal in (*RunFolder.JOURNALS, "incidents")}
    assert steps == {"metrics": [1, 2], "evaluations": [1], "skipped": [1, 2], "incidents": [3]}
