"""Encoding jobs that meet bad shards, full disks, signals and faults of ours: what they say and what they leave."""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lvdm.config import Condition
from lvdm.config.base import dump_yaml
from lvdm.data.build_index import build_index
from lvdm.data.index import open_index
from lvdm.data.latents import read_latent_set
from lvdm.data.one_pass import OnePassDataset, SourceSample
from lvdm.data.writer import write_shard
from lvdm.errors import Requeue, UserError
from lvdm.jobs import encode_latents, encoding_worker
from lvdm.jobs.encode_latents import Settings
from lvdm.jobs.encoders import Encoders, load_encoders
from lvdm.jobs.encoding_source import EncodingSource, open_encoding_source
from lvdm.jobs.leases import FOLDER
from lvdm.jobs.shard_board import ATTEMPTS, FAILED, Board
from lvdm.jobs.shard_queue import ShardQueue
from lvdm.weights.native import save_model
from tests.conftest import Toy
from tests.data.conftest import shape_sample, write_set
from tests.jobs.test_encode_latents import contents, encode, parsed

CPU = torch.device("cpu")
LATENTS_ALONE = Settings(only="latents", frames_at_once=8)
COMMAND = str(Path(__file__).resolve().parents[2] / "tools" / "encode_latents.py")
_CONTEXT = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def models(toy: Toy) -> Encoders:
    """The VAE of the toy's config."""
    return load_encoders(parsed(toy), CPU, torch.float32, "latents")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five shards of two clips; not to be changed."""
    return write_set(tmp_path_factory.mktemp("source"), [shape_sample(n, 2) for n in range(10)], per_shard=2)


@pytest.fixture(scope="module")
def sound(toy: Toy, source: str, models: Encoders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a job makes of it that meets nothing."""
    target = tmp_path_factory.mktemp("sound") / "latents"
    encode(toy, source, target, LATENTS_ALONE, encoders=models)
    return contents(target)


def leftovers(target: Path) -> list[str]:
    """What a job that ended must not leave."""
    return [str(path) for name in (".writing-*", ".leases", ".new-*") for path in target.rglob(name)]


def one_line(text: str) -> str:
    (line,) = text.strip().splitlines()
    return line


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[Any, str]]]:
    """Runs the command in this process: its exit code, and what it says on stderr."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}

    def call(*words: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["encode_latents.py", *words])
        capsys.readouterr()
        try:
            runpy.run_path(COMMAND, run_name="__main__")
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def config_file(toy: Toy, path: Path, **changes: Any) -> str:
    path.write_text(dump_yaml(parsed(toy, **changes)))
    return str(path)


def test_shards_that_cannot_be_read_are_tried_thrice_and_listed_and_the_others_finished(
    toy: Toy,
    source: str,
    sound: dict[str, bytes],
    models: Encoders,
    run: Callable[..., tuple[Any, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder, target = str(shutil.copytree(source, tmp_path / "source")), tmp_path / "latents"

    digests = open_encoding_source(folder, parsed(toy).data.video.clip.sizes).digests()  # type: ignore[union-attr]

    def open_and_lose(*given: Any, **how: Any) -> EncodingSource:
        found = open_encoding_source(*given, **how)
        (tmp_path / "source" / "00001.tar").unlink(missing_ok=True)
        os.truncate(tmp_path / "source" / "00003.tar", 2000)
        return found

    monkeypatch.setattr("lvdm.storage.FIRST_PAUSE", 0.001)
    with monkeypatch.context() as patch:
        patch.setattr(encode_latents, "open_encoding_source", open_and_lose)
        patch.setattr("lvdm.jobs.encoders.load_encoders", lambda *given: models)
        config = config_file(toy, tmp_path / "config.yaml")
        words = ("--config", config, "--shards", folder, "--out", str(target), "--only", "latents")
        code, said = run(*words, "--frames-at-once", "8")
    assert code == 2
    assert one_line(said) == (
        f"encode_latents: error: 2 shards could not be encoded; mend them, remove {target}/.failed and start again"
    )
    reasons = Board(str(target), digests, "")
    reasons.look()
    assert set(reasons.given_up) == {"00001", "00003"}
    assert "FileNotFoundError" in reasons.reasons()["00001"]
    assert "bytes came instead of" in reasons.reasons()["00003"]
    assert len(list((target / FAILED).iterdir())) == 2 * ATTEMPTS
    assert read_latent_set(str(target)).samples == len(open_index([str(target)])) == 6
    assert leftovers(target) == []
    # of finished shards nothing differs from those of a sound source
    assert {name for name, data in contents(target).items() if sound.get(name) == data} >= {
        f"0000{number}{part}" for number in (0, 2, 4) for part in (".tar", ".parquet")
    }

    for name in ("00001.tar", "00003.tar"):
        shutil.copy2(Path(source) / name, tmp_path / "source" / name)
    again = encode(toy, folder, target, LATENTS_ALONE, encoders=models)
    assert (again.samples, len(again.given_up)) == (6, 2)  # as long as nobody removes the list
    shutil.rmtree(target / FAILED)
    again = encode(toy, folder, target, LATENTS_ALONE, encoders=models)
    assert (again.samples, again.skipped_shards, again.given_up) == (10, 3, {})
    tars = {name: data for name, data in contents(target).items() if name.endswith((".tar", ".parquet"))}
    assert tars == {name: data for name, data in sound.items() if name.endswith((".tar", ".parquet"))}


class Deadly(OnePassDataset):
    """Kills the process that reads one of its samples."""

    def _loaded(self, sample: SourceSample, members: dict[str, bytes]) -> SourceSample:
        if sample.key == shape_sample(3, 2).key and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._loaded(sample, members)


def test_a_sample_that_kills_loader_processes_is_listed_as_bad(
    toy: Toy, source: str, models: Encoders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    look = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (0.1,))  # torch looks for dead workers more often than every 5 s
    monkeypatch.setattr(encoding_worker, "OnePassDataset", Deadly)
    done = encode(toy, source, tmp_path / "latents", LATENTS_ALONE, encoders=models, data__workers=1)
    assert [(item.shard, item.key, item.reason) for item in done.failed] == [
        (f"{source}/00001.tar", shape_sample(3, 2).key, "killed two workers that read it")
    ]
    assert (done.samples, done.given_up) == (9, {})
    assert leftovers(tmp_path / "latents") == []


def test_a_full_disk_is_one_line_and_the_job_goes_on_when_there_is_place(
    toy: Toy, disk: Callable[[str], Path], tmp_path: Path
) -> None:
    target = disk("size=300k") / "latents"
    with pytest.raises(UserError, match=rf"^cannot write {target}/\S+: No space left on device$"):
        encode(toy, toy.shards, target)
    finished = {path.name: path.stat().st_mtime_ns for path in target.glob("*_manifest.json")}
    assert 0 < len(finished) < 3
    assert leftovers(target) == []
    assert not (target / FAILED).exists()  # it is no fault of the shards
    disk("size=2m")
    done = encode(toy, toy.shards, target)
    assert (done.samples, done.skipped_shards) == (24, len(finished))
    assert contents(target) == contents(toy.latents)
    assert {name: (target / name).stat().st_mtime_ns for name in finished} == finished


def test_a_read_only_target_is_one_line(
    toy: Toy, source: str, models: Encoders, disk: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = disk("size=2m")
    encode(toy, source, folder / "done", LATENTS_ALONE, encoders=models)
    before = contents(folder)
    disk("ro")
    for target in (folder / "done", folder / "new"):
        with pytest.raises(UserError, match=rf"^cannot write {target}/\S+: Read-only file system$"):
            encode(toy, source, target, LATENTS_ALONE, encoders=models)
        assert contents(folder) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"--out": "{tmp}/file"}, "cannot write {tmp}/file/encoding.json: Not a directory"),
        ({"--out": "{tmp}/other"}, "{tmp}/other is not empty and holds no latents; choose another folder"),
        (
            {"--out": "{tmp}/damaged"},
            "{tmp}/damaged/encoding.json is damaged or of another lvdm; choose another folder",
        ),
        ({"vae.folder": "{tmp}/nowhere"}, "vae.folder {tmp}/nowhere holds no exported autoencoder"),
        ({"vae.folder": "{tmp}/other"}, "vae.folder {tmp}/other holds no exported autoencoder"),
        ({"vae.folder": "{tmp}/unet"}, "vae.folder {tmp}/unet holds a text_unet, not a video_autoencoder"),
        ({"--shards": "{tmp}/other"}, "{tmp}/other has no index.arrow; build it with: python tools/index_shards.py"),
        ({"--shards": "{tmp}/nowhere"}, "no such folder of shards: {tmp}/nowhere"),
        ({"data.video.clip.frames": "3"}, "clips of frames x height x width (3, 16, 16) do not fit the autoencoder"),
        ({"data.video.clip.min_frames": "99"}, "no samples are left of the 10 in {source}: 10 by too short"),
    ],
)
def test_bad_input_is_one_line_and_leaves_what_was_there(
    toy: Toy,
    source: str,
    words: dict[str, str],
    said: str,
    run: Callable[..., tuple[Any, str]],
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    save_model(tmp_path / "unet", {}, {"model": {"kind": "text_unet"}, "training": {}, "weights": "ema"})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "encoding.json").write_text("{}")
    config = config_file(toy, tmp_path / "config.yaml", data__kind="video")
    before = contents(tmp_path)
    given = {"--shards": source, "--out": "{tmp}/out", "--only": "latents"} | words
    texts = {name: value.format(tmp=tmp_path) for name, value in given.items()}
    options = [word for pair in texts.items() for word in (pair if "--" in pair[0] else ("=".join(pair),))]
    code, err = run("--config", config, *options)
    assert code == 2
    assert one_line(err).startswith(f"encode_latents: error: {said.format(tmp=tmp_path, source=source)}")
    assert contents(tmp_path) == before


def _stopped(words: list[str], slow: str) -> None:
    """The command, where reading or encoding a micro-batch takes long."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def late(function: Callable[..., Any]) -> Callable[..., Any]:
        def later(*given: Any) -> Any:
            time.sleep(0.5)
            return function(*given)

        return later

    if slow == "reading":
        OnePassDataset.__getitems__ = late(OnePassDataset.__getitems__)  # type: ignore[method-assign]
    else:
        Encoders.moments = late(Encoders.moments)  # type: ignore[method-assign]
    sys.argv = ["encode_latents.py", *words]
    runpy.run_path(COMMAND, run_name="__main__")


def test_signals_end_the_job_in_seconds_and_in_good_order(
    toy: Toy, source: str, sound: dict[str, bytes], models: Encoders, tmp_path: Path
) -> None:
    config = config_file(toy, tmp_path / "config.yaml")
    cases = [(signal.SIGTERM, "reading", 85), (signal.SIGTERM, "encoding", 85), (signal.SIGINT, "reading", 130)]
    started = []
    for number, (_, slow, _) in enumerate(cases):
        words = ["--config", config, "--shards", source, "--out", str(tmp_path / f"latents{number}")]
        words += ["--only", "latents", "--frames-at-once", "8"]
        process = _CONTEXT.Process(target=_stopped, args=(words, slow))
        process.start()
        started.append(process)
    try:
        for number, (process, (what, _, code)) in enumerate(zip(started, cases, strict=True)):
            target = tmp_path / f"latents{number}"
            deadline = time.monotonic() + 60
            while not list((target / FOLDER).glob("0*.json")) and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(0.2)
            assert not (target / "latents.json").exists()
            os.kill(process.pid or 0, what)
            process.join(10)
            assert process.exitcode == code
            assert leftovers(target) == []
            assert not (target / FAILED).exists()
            assert not (target / "latents.json").exists()
    finally:
        for process in started:
            process.kill()
    for number in range(len(cases)):
        encode(toy, source, tmp_path / f"latents{number}", LATENTS_ALONE, encoders=models)
        assert contents(tmp_path / f"latents{number}") == sound


def test_a_fault_of_ours_ends_the_process_and_is_recorded(
    toy: Toy, source: str, models: Encoders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*given: Any, **how: Any) -> Any:
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr(models, "moments", fail)
        with pytest.raises(RuntimeError, match="a fault of ours"):
            encode(toy, source, tmp_path, LATENTS_ALONE, encoders=models)
    (record,) = (tmp_path / FAILED).iterdir()
    assert json.loads(record.read_text()) == {"reason": "RuntimeError: a fault of ours"}
    assert leftovers(tmp_path) == []
    assert not list(tmp_path.glob("0*"))
    with monkeypatch.context() as patch:  # in the thread that writes
        patch.setattr(encoding_worker, "write_shard", fail)
        with pytest.raises(RuntimeError, match="a fault of ours"):
            encode(toy, source, tmp_path, LATENTS_ALONE, encoders=models)
    assert leftovers(tmp_path) == []
    with monkeypatch.context() as patch:  # in the thread that claims
        patch.setattr(Board, "is_finished", fail)
        with pytest.raises(RuntimeError, match="a fault of ours"):
            encode(toy, source, tmp_path, LATENTS_ALONE, encoders=models)
    assert leftovers(tmp_path) == []
    assert encode(toy, source, tmp_path, LATENTS_ALONE, encoders=models).samples == 10


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow_with_the_shards(
    toy: Toy, models: Encoders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = str(tmp_path / "source")
    clip = shape_sample(0, 1)
    for shard in range(60):
        write_shard(folder, shard, [clip])
    build_index(folder)
    sizes: list[int] = []
    done = ShardQueue.done

    def measured(self: ShardQueue, shard: str) -> None:
        done(self, shard)
        sizes.append(resident())

    monkeypatch.setattr(ShardQueue, "done", measured)
    monkeypatch.setattr("lvdm.storage.sync", lambda path: None)
    made = encode(toy, folder, tmp_path / "latents", LATENTS_ALONE, encoders=models)
    assert made.samples == 60
    assert len(sizes) > 50
    assert sum(sizes[-10:]) / 10 - sum(sizes[15:25]) / 10 < 5e6


def test_a_worker_that_can_read_nothing_ends_and_gives_no_shard_up(
    toy: Toy, models: Encoders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shards = write_set(tmp_path / "source", [shape_sample(number, 2) for number in range(12)], per_shard=1)

    def open_and_lose(*given: Any, **how: Any) -> EncodingSource:
        found = open_encoding_source(*given, **how)
        for tar in Path(shards).glob("*.tar"):
            tar.rename(tar.with_suffix(".gone"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(encode_latents, "open_encoding_source", open_and_lose)
        with pytest.raises(UserError, match=r"cannot read .*\.tar: FileNotFoundError"):
            encode(toy, shards, tmp_path / "latents", LATENTS_ALONE, encoders=models)
    assert len(list((tmp_path / "latents" / FAILED).iterdir())) < 12
    for gone in Path(shards).glob("*.gone"):
        gone.rename(gone.with_suffix(".tar"))
    assert encode(toy, shards, tmp_path / "latents", LATENTS_ALONE, encoders=models).samples == 12


def test_a_worker_whose_source_changed_meanwhile_removes_nothing_and_asks_for_another_start(
    toy: Toy, models: Encoders, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    samples = [shape_sample(number, 2) for number in range(4)]
    shards = write_set(tmp_path / "source", samples[:3], per_shard=1)
    run_worker = encoding_worker.Worker.run

    def work_while_others_add_a_shard(worker: encoding_worker.Worker) -> None:
        run_worker(worker)
        write_shard(shards, 3, samples[3:])
        build_index(shards)
        shutil.copy(tmp_path / "latents" / "00001.tar", tmp_path / "latents" / "00003.tar")
        shutil.copy(tmp_path / "latents" / "00001_manifest.json", tmp_path / "latents" / "00003_manifest.json")

    with monkeypatch.context() as patch:
        patch.setattr(encoding_worker.Worker, "run", work_while_others_add_a_shard)
        with pytest.raises(Requeue, match=f"^{shards} changed while it was encoded"):
            encode(toy, shards, tmp_path / "latents", LATENTS_ALONE, encoders=models)
    assert (tmp_path / "latents" / "00003.tar").exists()
    assert encode(toy, shards, tmp_path / "latents", LATENTS_ALONE, encoders=models).samples == 4


def test_other_conditions_are_refused_in_a_begun_folder(
    toy: Toy, source: str, models: Encoders, tmp_path: Path
) -> None:
    encode(toy, source, tmp_path / "latents", LATENTS_ALONE, encoders=models)
    chosen = Settings(only="latents", frames_at_once=8, where=(Condition.model_validate("frames > 1"),))
    with pytest.raises(UserError, match=r"made with another where: none, not \['frames > 1.0'\]"):
        encode(toy, source, tmp_path / "latents", chosen, encoders=models)
