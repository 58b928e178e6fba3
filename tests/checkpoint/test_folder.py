"""Folders of checkpoints on disks and in stores: complete or absent, the best kept, one line where writing fails."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lvdm import storage
from lvdm.checkpoint import folder as folders
from lvdm.checkpoint.blocks import Damaged
from lvdm.checkpoint.folder import CheckpointFolder, Retention, newest_good, open_checkpoint
from lvdm.checkpoint.reader import step_name
from lvdm.errors import Requeue, UserError
from tests.checkpoint.files import (
    deal_out,
    make_tensors,
    rank_file,
    read_all,
    same,
    write_checkpoint,
    write_files,
)
from tests.data.stores import free_port, s3_server


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        patch.setitem(fsspec.config.conf, "s3", {"endpoint_url": endpoint, "key": "any", "secret": "any"})
        fsspec.filesystem("s3").makedirs("bucket")
        yield "s3://bucket"


@pytest.fixture(params=["disk", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for checkpoints that is not there yet."""
    name = tmp_path.name
    if request.param == "disk":
        return str(tmp_path / "run" / "checkpoints")
    return f"memory://{name}/ckpt" if request.param == "memory" else f"{request.getfixturevalue('bucket')}/{name}/ckpt"


def everything(root: str) -> set[str]:
    """All files below, hidden ones too."""
    fs, path = storage.locate(root)
    fs.invalidate_cache()
    return {os.path.relpath(name, path) for name in fs.find(path)} - {"."}  # some stores keep empty folders


def spoil(root: str, step: int, name: str = "rank-00001", end: Callable[[int], bytes] = lambda last: b"") -> None:
    """Put ``end`` of a file's last byte in its place: cut it off, if nothing else is said."""
    fs, path = storage.locate(f"{root}/{step_name(step)}")
    (file,) = [file for file in fs.find(path) if name in file]
    data = fs.cat_file(file)
    fs.pipe_file(file, data[:-1] + end(data[-1]))
    fs.invalidate_cache()


def steps(root: str) -> list[int]:
    return [int(name.split("-")[1]) for name in CheckpointFolder(root).names()]


def test_published_ones_are_found_newest_first_and_damaged_ones_named(root: str) -> None:
    folder = CheckpointFolder(root)
    assert (folder.names(), folder.latest(), folder.pointed_at("best")) == ([], "", "")
    with pytest.raises(UserError, match=rf"^no checkpoint to read in {root}: there is none$"):
        open_checkpoint(root)
    for step in (9, 100, 20):
        write_checkpoint(root, step)
        assert folder.latest() == step_name(step)
    assert steps(root) == [100, 20, 9]
    (checkpoint,), damaged = newest_good(map(folder.location, folder.names()), verify=True)
    assert (checkpoint.name, damaged) == ("step-00000100", {})
    assert same(read_all(checkpoint), make_tensors(100))
    assert same(read_all(open_checkpoint(f"{root}/{step_name(9)}")), make_tensors(9))
    assert open_checkpoint(f"{root}/latest").name == "step-00000020"

    spoil(root, 100)
    spoil(root, 20, "manifest")
    found, damaged = newest_good(map(folder.location, folder.names()), 2, verify=True)
    assert [checkpoint.name for checkpoint in found] == ["step-00000009"]
    assert same(read_all(found[0]), make_tensors(9))
    faults = list(map(str, damaged.values()))
    assert list(damaged) == [f"{root}/{step_name(step)}" for step in (100, 20)]
    assert "step-00000100/rank-00001" in faults[0]
    assert "step-00000020/manifest.json" in faults[1]
    with pytest.raises(UserError, match=r"^checkpoint is damaged: .*step-00000100/rank-00001"):
        open_checkpoint(f"{root}/{step_name(100)}")
    spoil(root, 9)
    with pytest.raises(UserError, match=rf"^no checkpoint to read in {root}: all are damaged: .*100.*; .*20.*; .*009"):
        open_checkpoint(root)


def test_an_attempt_that_was_given_up_leaves_nothing(root: str) -> None:
    write_checkpoint(root, 1)
    before = everything(root)
    folder = CheckpointFolder(root)
    for step in (1, 2):
        attempt = folder.begin(step, 1000)
        fs, place = storage.locate(attempt.place)
        fs.pipe_file(f"{place}/{attempt.file_name(0)}", b"half")
        assert steps(root)[-1] == 1
        assert open_checkpoint(root).name == "step-00000001"
        folder.abandon(attempt)
        assert everything(root) == before


def test_what_is_not_whole_is_not_published(root: str) -> None:
    place = write_checkpoint(root, 1)
    manifest = open_checkpoint(place).manifest
    folder = CheckpointFolder(root)
    for step in (1, 2):
        attempt = folder.begin(step, 1000)
        fs, path = storage.locate(attempt.place)
        entries = {attempt.file_name(rank): entry for rank, entry in enumerate(manifest.files.values())}
        for name, entry in list(entries.items())[1:]:
            fs.pipe_file(f"{path}/{name}", bytes(entry.size))
        with pytest.raises(Damaged, match=r"rank-00000"):
            folder.publish(attempt, manifest.model_copy(update={"step": step, "files": entries}))
        folder.abandon(attempt)
        assert same(read_all(open_checkpoint(root)), make_tensors(1))
        assert folder.latest() == "step-00000001"


def test_a_step_is_published_again_and_the_files_of_the_one_before_go(root: str) -> None:
    for step in (1, 2):
        write_checkpoint(root, step)
    for seed in (50, 51, 52):
        write_checkpoint(root, 2, make_tensors(seed))
        assert same(read_all(open_checkpoint(root)), make_tensors(seed))
        assert len([name for name in everything(root) if name.startswith("step-00000002/")]) == 4
    spoil(root, 2)
    write_checkpoint(root, 2, make_tensors(53))
    assert same(read_all(open_checkpoint(root)), make_tensors(53))
    CheckpointFolder(root).prune(Retention(last=2))
    CheckpointFolder(root).sweep()
    assert same(read_all(open_checkpoint(root)), make_tensors(53))
    assert len(everything(root)) == 4 + 4 + 1
    assert steps(root) == [2, 1]


def test_leftovers_of_killed_attempts_are_swept_and_nothing_else(root: str) -> None:
    for step in (1, 2):
        write_checkpoint(root, step)
    fs, path = storage.locate(root)
    local = "://" not in root
    fs.pipe_file(f"{path}/step-00000001/notes.txt", b"mine")
    spoil(root, 2)
    keep = everything(root)
    leftovers = [
        "step-00000001/rank-00000.deadbeef.safetensors",
        *([".step-00000003.aa.partial/rank-00000.safetensors", ".step-00000001.bb.deleted/manifest.json",
           ".writing-xy/latest"] if local else ["step-00000003/rank-00000.cc.safetensors"]),
    ]  # fmt: skip
    for name in leftovers:
        fs.makedirs(os.path.dirname(f"{path}/{name}"), exist_ok=True)
        fs.pipe_file(f"{path}/{name}", b"x")
    CheckpointFolder(root).sweep()
    assert everything(root) == keep
    assert open_checkpoint(root).name == "step-00000001"


@pytest.mark.parametrize(
    ("keep", "expected", "best"),
    [
        (Retention(last=1), [8], ""),
        (Retention(last=3), [8, 7, 6], ""),
        (Retention(last=2, every_samples=25), [8, 7, 5, 3], ""),  # 10 samples a step: the first behind 25, 50, 75
        (Retention(last=1, best=2, score="loss"), [8, 4, 2], "step-00000004"),
        (Retention(last=1, best=1, score="-loss"), [8, 3], "step-00000003"),
        (Retention(last=1, best=9, score="loss"), [8, 6, 4, 3, 2], "step-00000004"),
        (Retention(last=1, best=2, score="nothing"), [8], ""),
        (Retention(last=1, score="loss"), [8], ""),
    ],
)
def test_retention(tmp_path: Path, keep: Retention, expected: list[int], best: str) -> None:
    losses = {2: 0.5, 3: 0.9, 4: 0.1, 5: float("nan"), 6: 0.7}
    for step in range(1, 9):
        write_checkpoint(tmp_path, step, scores={"loss": losses[step]} if step in losses else {})
    folder = CheckpointFolder(tmp_path)
    for _ in range(2):  # what stays, stays
        folder.prune(keep)
        assert steps(str(tmp_path)) == expected
        assert folder.pointed_at("best") == best
    assert not list(tmp_path.glob(".*"))
    if best:
        assert open_checkpoint(tmp_path / "best").name == best


def test_a_first_checkpoint_that_was_never_finished_is_none(root: str) -> None:
    folder = CheckpointFolder(root)
    attempt = folder.begin(1, 1000)
    fs, place = storage.locate(attempt.place)
    fs.pipe_file(f"{place}/{attempt.file_name(0)}", b"half")
    assert folder.names() == []
    with pytest.raises(UserError, match=r"there is none$"):
        open_checkpoint(root)
    folder.sweep()
    assert everything(root) == set()


def test_retention_while_a_run_goes_on_and_in_stores(root: str) -> None:
    folder, kept = CheckpointFolder(root), []
    for step in range(1, 8):
        write_checkpoint(root, step, scores={"psnr": float(step % 3)})
        folder.prune(Retention(last=2, every_samples=40, best=1, score="-psnr"))
        kept.append(steps(root))
    assert kept == [[1], [2, 1], [3, 2], [4, 3, 2], [5, 4, 2], [6, 5, 4, 2], [7, 6, 4, 2]]
    assert len(everything(root)) == 4 * 4 + 2
    assert folder.pointed_at("best") == "step-00000002"


def test_damaged_ones_go_when_enough_newer_ones_are_whole_and_never_before(root: str) -> None:
    for step in range(1, 7):
        write_checkpoint(root, step)
    for step in (2, 4, 6):
        spoil(root, step)
    CheckpointFolder(root).prune(Retention(last=2))
    assert steps(root) == [6, 5, 4, 3]
    for step in (5, 3):
        spoil(root, step)
    CheckpointFolder(root).prune(Retention(last=2))
    assert steps(root) == [6, 5, 4, 3]  # none is whole: nothing is deleted


def test_one_that_was_passed_over_does_not_count_as_kept(root: str) -> None:
    for step in (3, 4, 6):
        write_checkpoint(root, step)
    folder = CheckpointFolder(root)
    folder.prune(Retention(last=3))
    folder.pass_over("step-00000006")  # of the right size, with a bit that has flipped
    write_checkpoint(root, 5)
    folder.prune(Retention(last=1))
    assert steps(root) == [6, 5]
    write_checkpoint(root, 7)
    folder.prune(Retention(last=1, every_samples=60))
    assert steps(root) == [7]


def later(clock: dict[str, Any]) -> dict[str, Any]:
    """Another clock."""
    return clock | {"passed_over": [3, 4]}


def test_a_run_goes_back_to_the_newest_whole_one_before_a_step_with_another_clock(root: str) -> None:
    for step in (1, 2, 3, 4, 6):
        write_checkpoint(root, step, scores={"loss": 1 / step})
    folder = CheckpointFolder(root)
    folder.prune(Retention(last=5, best=1, score="loss"))
    assert folder.roll_back(1, later) == ""
    assert (steps(root), folder.pointed_at("best")) == ([6, 4, 3, 2, 1], "step-00000006")
    spoil(root, 4)
    folder.pass_over("step-00000003")
    before = open_checkpoint(f"{root}/step-00000002").manifest
    assert folder.roll_back(5, later) == "step-00000002"
    assert (steps(root), folder.latest(), folder.pointed_at("best")) == ([2, 1], "step-00000002", "")
    checkpoint = open_checkpoint(root)
    assert checkpoint.manifest == before.model_copy(update={"clock": {"samples": 20, "passed_over": [3, 4]}})
    assert same(read_all(checkpoint), make_tensors(2))
    assert len(everything(root)) == 4 + 4 + 1
    write_checkpoint(root, 5, scores={"loss": 3.0})
    folder.prune(Retention(last=1, best=1, score="loss"))
    assert (steps(root), folder.pointed_at("best")) == ([5, 2], "step-00000002")
    with pytest.raises(UserError, match="step-00000003"):
        open_checkpoint(f"{root}/step-00000003")


def test_a_run_does_not_go_back_to_one_with_a_flipped_bit(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    spoil(str(tmp_path), 2, end=lambda last: bytes([last ^ 1]))
    assert CheckpointFolder(tmp_path).roll_back(3, later) == "step-00000001"
    assert open_checkpoint(tmp_path).manifest.clock["passed_over"] == [3, 4]


def test_nothing_is_given_up_for_one_that_cannot_be_read_just_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    before, real = everything(str(tmp_path)), os.open

    def too_many(path: Any, *given: Any, **how: Any) -> int:
        if "step-00000002/manifest" in str(path):
            raise OSError(24, "Too many open files")
        return real(path, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", too_many)
        with pytest.raises(Requeue, match=r"^cannot go back to a checkpoint before step 3: .*Too many open files"):
            CheckpointFolder(tmp_path).roll_back(3, later)
    assert everything(str(tmp_path)) == before


def test_in_stores_the_cost_of_retention_does_not_grow_with_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, listed = f"memory://{tmp_path.name}/ckpt", []
    list_store = folders.list_store
    monkeypatch.setattr(folders, "list_store", lambda url: listed.append(url) or list_store(url))
    folder = CheckpointFolder(root)
    for step in range(1, 9):
        write_checkpoint(root, step)
    folder.prune(Retention(last=1, every_samples=10))
    assert len(steps(root)) == 8
    listed.clear()
    folder.prune(Retention(last=1, every_samples=10))
    assert listed == [root]


def test_what_cannot_be_read_just_now_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    real = os.open

    def too_many(path: Any, *given: Any, **how: Any) -> int:
        if "step-00000001/manifest" in str(path):
            raise OSError(24, "Too many open files")
        return real(path, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", too_many)
        CheckpointFolder(tmp_path).prune(Retention(last=1))
    assert steps(str(tmp_path)) == [3, 1]


def test_strange_names_are_passed_over(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 5)
    for name in ("step-000000006", "step-7", "step-00000008x", "step-0000000²", "steps", "step-" + "9" * 100):
        (tmp_path / name).mkdir()
    assert CheckpointFolder(tmp_path).names() == ["step-00000005"]
    for text in ("../../etc", "step-00000005/../..", "", "\0", "x" * 10**6):
        (tmp_path / "latest").write_text(text)
        assert CheckpointFolder(tmp_path).latest() == ""
    assert CheckpointFolder(f"file://{tmp_path}").begin(6, 1).place.startswith(f"{tmp_path}/.step-00000006.")


def test_a_run_whose_config_names_another_place(tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, elsewhere = tmp_path / "work" / "runs" / "a", f"{bucket}/elsewhere/{tmp_path.name}"
    run.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    write_checkpoint(run / "checkpoints", 1)
    write_checkpoint(elsewhere, 2)
    write_checkpoint(tmp_path / "work" / "ckpt", 3)
    write_checkpoint(tmp_path / "absolute", 4)

    def config(**given: str) -> None:
        (run / "config.yaml").write_text(
            "run: {" + ", ".join(f"{key}: '{value}'" for key, value in given.items()) + "}"
        )

    assert open_checkpoint(run).manifest.step == 1
    for given, step in (
        ({"folder": "runs/a"}, 1),
        ({"folder": "runs/a", "checkpoints": ""}, 1),
        ({"folder": "runs/a", "checkpoints": elsewhere}, 2),
        ({"folder": "runs/a", "checkpoints": "ckpt"}, 3),
        ({"folder": "runs/a", "checkpoints": str(tmp_path / "absolute")}, 4),
        ({"folder": str(run), "checkpoints": "ckpt"}, 3),
    ):
        config(**given)
        assert open_checkpoint("runs/a").manifest.step == step
        assert open_checkpoint(run).manifest.step == step
    config(folder="runs/a", checkpoints="ckpt")
    monkeypatch.chdir("/")  # a relative place counts from where the run was started
    assert open_checkpoint(run).manifest.step == 3
    (run / "config.yaml").write_text("run: [")
    with pytest.raises(UserError, match=r"config.yaml is not valid YAML"):
        open_checkpoint(run)
    (run / "config.yaml").unlink()
    os.mkfifo(run / "config.yaml")
    assert open_checkpoint(run).manifest.step == 1


def test_too_little_room_is_one_line_before_anything_is_written(disk: Callable[[str], Path]) -> None:
    root = disk("size=80m")
    place = write_checkpoint(root, 1)
    before = everything(str(root))
    message = (
        rf"^cannot write checkpoint {root}/step-00000002: it takes 20 MB and 67 MB to spare, and its disk has \d\d MB "
        r"left; make room, or keep fewer \(run.keep\)$"
    )
    with pytest.raises(UserError, match=message):
        CheckpointFolder(root).begin(2, 20_000_000)
    assert everything(str(root)) == before
    assert not list(root.glob(".*"))
    assert same(read_all(open_checkpoint(place)), make_tensors(1))


def test_a_disk_that_fills_up_leaves_the_one_before(disk: Callable[[str], Path]) -> None:
    root = disk("size=80m")
    write_checkpoint(root, 1)
    folder = CheckpointFolder(root)
    manifest = open_checkpoint(root).manifest
    for step in (1, 2):
        attempt = folder.begin(step, 1000)
        for name in manifest.files:
            shutil.copy(root / "step-00000001" / name, attempt.place)
        with open(root / "filler", "wb", buffering=0) as filler:
            filler.write(bytes(80 << 20))
            assert filler.tell() < 80 << 20
            with pytest.raises(
                UserError, match=rf"^cannot write {attempt.place}/manifest.json: No space left on device$"
            ):
                folder.publish(attempt, manifest.model_copy(update={"step": step}))
            folder.abandon(attempt)
        (root / "filler").unlink()
        assert everything(str(root)) == {
            "latest",
            *(f"step-00000001/{name}" for name in ["manifest.json", *manifest.files]),
        }
        assert same(read_all(open_checkpoint(root)), make_tensors(1))


def test_a_read_only_folder_is_one_line(disk: Callable[[str], Path]) -> None:
    root = disk("size=80m") / "checkpoints"
    write_checkpoint(root, 1)
    write_checkpoint(root, 2)
    disk("ro")
    folder = CheckpointFolder(root)
    with pytest.raises(UserError, match=rf"^cannot write checkpoint {root}/step-00000003: Read-only file system$"):
        folder.begin(3, 1000)
    with pytest.raises(OSError, match="Read-only file system"):
        folder.prune(Retention(last=1))
    folder.sweep()
    assert same(read_all(open_checkpoint(root)), make_tensors(2))


@pytest.mark.parametrize("what", ["a file", "below a file", "a link to itself"])
def test_a_place_that_can_hold_nothing_is_one_line(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    root = tmp_path / {"a file": "file", "below a file": "file/x", "a link to itself": "link"}[what]
    with pytest.raises(UserError, match=rf"^cannot write checkpoint {root}/step-00000003: [A-Z][a-z ]+$"):
        CheckpointFolder(root).begin(3, 1000)
    with pytest.raises(UserError, match=rf"^(no checkpoint to read in|cannot list) {root}: [\w ]+$"):
        open_checkpoint(root)


def test_a_store_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    config = {"retries": {"max_attempts": 0}, "connect_timeout": 1}
    settings = {"endpoint_url": f"http://127.0.0.1:{free_port()}", "key": "x", "secret": "x", "config_kwargs": config}
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    for call in (
        lambda: open_checkpoint("s3://nowhere/run"),
        lambda: open_checkpoint("s3://nowhere/step-00000001"),
        lambda: CheckpointFolder("s3://nowhere/run").sweep(),
    ):
        with pytest.raises(Requeue, match=r"^cannot (list|read) s3://nowhere/.*after 6 attempts") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_bucket_that_is_not_there_is_one_line(bucket: str) -> None:
    with pytest.raises(UserError, match=r"^no checkpoint to read in s3://nobody/run: there is none$"):
        open_checkpoint("s3://nobody/run")


FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir", "shutil.rmtree"}


def killed_at(operation: int, action: Callable[[], object]) -> bool:
    """Whether ``action``, in a forked process, was killed right before that operation on files; else it ended."""
    child = os.fork()
    if child == 0:
        left = operation

        def count(event: str, _: object) -> None:
            nonlocal left
            if event in FILE_EVENTS:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(60)

        sys.addaudithook(count)
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "it failed"
    return False


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system in memory, where there is one: to sync many times takes no time there."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("case", "every"), [("the next", 1), ("the same step", 1), ("the same step, damaged", 3), ("the first", 3)]
)  # the last two do mostly what the first does
def test_a_kill_before_any_operation_on_files_leaves_the_old_one_or_the_new(
    memory: Path, case: str, every: int
) -> None:
    before, step = {"the next": ([1, 2], 3), "the first": ([], 3)}.get(case, ([1, 3], 3))
    old, new = make_tensors(70), make_tensors(71)
    old_files, new_files = ([rank_file(parts) for parts in deal_out(tensors, 3)] for tensors in (old, new))
    keep, kills, seen = Retention(last=1, best=1, score="loss"), 0, set()

    def save(root: Path) -> None:
        write_files(root, step, new_files, scores={"loss": 0.5})
        CheckpointFolder(root).prune(keep)

    while True:
        root = memory / str(kills)
        for given in before:
            write_files(root, given, old_files)
        if "damaged" in case:
            spoil(str(root), 3)
        if not killed_at(kills, lambda root=root: save(root)):  # type: ignore[misc]
            break
        if before or CheckpointFolder(root).names():
            found = read_all(open_checkpoint(root))
            assert same(found, old) or same(found, new), f"after {kills} operations"
            seen.add(same(found, new))
        CheckpointFolder(root).sweep()
        assert not list(root.glob(".*"))
        save(root)
        assert same(read_all(open_checkpoint(root)), new)
        assert steps(str(root)) == [3]
        assert len(everything(str(root))) == 4 + 2
        shutil.rmtree(root)
        kills += every
    assert kills > 30
    assert seen == ({True} if case == "the first" else {False, True})


def test_a_kill_while_a_run_goes_back_leaves_one_to_go_on_from(memory: Path) -> None:
    before, kills, seen = memory / "before", 0, set()
    for step in (1, 2, 3, 4):
        write_checkpoint(before, step)
    while True:
        root = memory / str(kills)
        shutil.copytree(before, root)
        if not killed_at(kills, lambda root=root: CheckpointFolder(root).roll_back(3, later)):  # type: ignore[misc]
            break
        seen.add(goes_on_after_a_kill(str(root)))
        assert not list(root.glob("**/.*"))
        shutil.rmtree(root)
        kills += 1
    assert kills > 30
    assert seen == {(4, False), (4, True), (3, True), (2, True)}


def goes_on_after_a_kill(root: str) -> tuple[int, bool]:
    """Step of the newest checkpoint, and whether the clock of step 2 has been amended; going back again is checked."""
    folder = CheckpointFolder(root)
    newest, step = open_checkpoint(root), open_checkpoint(f"{root}/step-00000002")
    assert same(read_all(newest), make_tensors(newest.manifest.step))
    assert same(read_all(step), make_tensors(2))
    before = newest.manifest.step, "passed_over" in step.manifest.clock
    folder.sweep()
    assert folder.roll_back(3, later) == folder.latest() == "step-00000002"
    assert open_checkpoint(root).manifest.clock == {"samples": 20, "passed_over": [3, 4]}
    assert steps(root) == [2, 1]
    assert len(everything(root)) == 4 + 4 + 1
    return before


class _Killed(BaseException):
    """Passes through what catches errors, as a kill does."""


class _Requests:
    """Counts the requests to stores, and ends the process, so to speak, before the one behind the last allowed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = 10**9
        persistently = storage.persistently

        def request(*given: Any, **how: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise _Killed
            return persistently(*given, **how)

        monkeypatch.setattr("lvdm.checkpoint.folder.persistently", request)
        monkeypatch.setattr("lvdm.checkpoint.blocks.persistently", request)

    def killed_at(self, number: int, action: Callable[[], object]) -> bool:
        """Whether ``action`` was killed before that request; else it ended."""
        self.left = number
        try:
            action()
        except _Killed:
            return True
        finally:
            self.left = 10**9
        return False


def test_a_kill_while_a_run_goes_back_in_a_store_leaves_one_to_go_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {step: [rank_file(parts) for parts in deal_out(make_tensors(step), 3)] for step in (1, 2, 3, 4)}
    requests, kills, seen = _Requests(monkeypatch), 0, set()
    while True:
        root = f"memory://{tmp_path.name}/{kills}"
        for step in files:
            write_files(root, step, files[step])
        if not requests.killed_at(kills, lambda root=root: CheckpointFolder(root).roll_back(3, later)):  # type: ignore[misc]
            break
        seen.add(goes_on_after_a_kill(root))
        kills += 1
    assert kills > 10
    assert seen == {(4, False), (4, True), (3, True), (2, True)}


@pytest.mark.parametrize("case", ["the next", "the same step"])
def test_a_kill_before_any_request_to_a_store_leaves_the_old_one_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    before = [1, 2] if case == "the next" else [1, 3]
    old, new = make_tensors(70), make_tensors(71)
    old_files, new_files = ([rank_file(parts) for parts in deal_out(tensors, 3)] for tensors in (old, new))
    requests, kills, seen = _Requests(monkeypatch), 0, set()

    def save(root: str) -> None:
        write_files(root, 3, new_files)
        CheckpointFolder(root).prune(Retention(last=1))

    while True:
        root = f"memory://{tmp_path.name}/{kills}"
        for given in before:
            write_files(root, given, old_files)
        if not requests.killed_at(kills, lambda root=root: save(root)):  # type: ignore[misc]
            break
        found = read_all(open_checkpoint(root))
        assert same(found, old) or same(found, new), f"after {kills} requests"
        seen.add(same(found, new))
        CheckpointFolder(root).sweep()
        save(root)
        assert same(read_all(open_checkpoint(root)), new)
        assert steps(root) == [3]
        assert len(everything(root)) == 4 + 1
        kills += 1
    assert kills > 10
    assert seen == {False, True}
