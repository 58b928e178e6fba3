"""Scale and shift from latents: against numpy over all of them, and against draws from their posteriors."""

from __future__ import annotations

import errno
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lvdm.config import ClipConfig
from lvdm.data import fetch
from lvdm.data.build_index import build_index
from lvdm.data.fetch import Fetcher, Span
from lvdm.data.latents import (
    LatentSetInfo,
    LatentText,
    LatentVAE,
    latent_member,
    pack_latent,
    pack_text,
    read_latent_set,
    read_unconditional,
    text_member,
    write_latent_set,
)
from lvdm.data.writer import ShardSample, sample_key, write_shard
from lvdm.errors import UserError
from lvdm.jobs import latent_stats
from lvdm.jobs.latent_stats import ChannelSums, check_same_autoencoder, measure, write_scaling
from tests import commands
from tests.conftest import Toy
from tools.latent_stats import main

C = 3
VAE = LatentVAE(kind="lvdm", name="somewhere", sha256="ab" * 32)
INFO = LatentSetInfo(
    vae=VAE,
    text=LatentText(name="encoder", sha256="cd", max_length=8, dim=5, mask_padding=True),
    clip=ClipConfig(frames=4, height=16, width=16),
    clips=2,
    dtype="fp32",
    shapes=((C, 2, 4, 4),),
    samples=11,
    lvdm_version="0",
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LVDM_CACHE", str(tmp_path / "cache"))


def moments_of(count: int, seed: int = 0, mean: float = 0.0) -> list[Tensor]:
    """Latents whose channels have means and deviations of their own, and log variances that reach the bounds."""
    draws = torch.Generator().manual_seed(seed)
    channels = torch.arange(C, dtype=torch.float32)[:, None, None, None]
    made = []
    for _ in range(count):
        means = torch.randn(C, 2, 4, 4, generator=draws) * (channels + 0.5) + 2 * channels - 1 + mean
        made.append(torch.cat([means, torch.randn(C, 2, 4, 4, generator=draws) - channels]))
    made[0][C, 0, 0, 0] = -50.0  # less than the bound: no variance to speak of
    return made


def write_set(folder: str, moments: Sequence[Tensor], info: LatentSetInfo = INFO, per_shard: int = 4) -> str:
    """A folder of samples of one and two clips in turn."""
    samples: list[ShardSample] = []
    clips, left = 1, list(moments)
    while left:
        taken, left = left[:clips], left[clips:]
        members = {text_member(0, 0): pack_text(torch.zeros(4, 5), "fp32")} if info.text else {}
        members |= {latent_member(n): pack_latent(m, info.dtype) for n, m in enumerate(taken) if info.vae}
        samples.append(ShardSample(sample_key(0, len(samples), 100), members))
        clips = 3 - clips
    for number in range(-(-len(samples) // per_shard)):
        write_shard(folder, number, samples[number * per_shard : (number + 1) * per_shard])
    build_index(folder)
    write_latent_set(folder, info, torch.ones(1, 5) if info.text else None)
    return folder


def write_manifests(folder: str, sums: dict[str, Any] | None = None) -> None:
    """The manifests that the encoding job would have left, with the true sums of each shard or with others."""
    for stats in sorted(Path(folder).glob("*_stats.json")):
        name, tree = stats.name.removesuffix("_stats.json"), json.loads(stats.read_text())
        true = latent_stats.measure(write_part(folder, name)).to_json() if sums is None else sums
        manifest = {"files": tree["files"], "samples": tree["successes"], "sums": true, "left_out": [], "settings": ""}
        (Path(folder) / f"{name}_manifest.json").write_text(json.dumps(manifest))


def write_part(folder: str, name: str) -> str:
    """A copy of a set with one of its shards."""
    part = Path(folder) / "parts" / name
    part.mkdir(parents=True)
    (part / f"{name}.tar").write_bytes((Path(folder) / f"{name}.tar").read_bytes())
    build_index(str(part))
    write_latent_set(str(part), INFO, torch.ones(1, 5))
    return str(part)


def by_numpy(moments: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation by channel: the law of total variance over all values at once."""
    stacked = torch.stack(list(moments)).double().numpy()
    means, variances = stacked[:, :C], np.exp(np.clip(stacked[:, C:], -30, 20))
    axes = (0, 2, 3, 4)
    return means.mean(axes), np.sqrt(means.var(axes) + variances.mean(axes))


def test_the_sums_are_those_of_numpy_however_they_are_merged() -> None:
    moments = moments_of(9, mean=100.0)
    means, deviations = by_numpy(moments)
    each = [ChannelSums.of(m) for m in moments]
    left = ChannelSums()
    for sums in each:
        left = left.merge(sums)
    right = each[8].merge(each[7].merge(each[6])).merge(each[5])
    right = right.merge(each[0].merge(each[1]).merge(each[2].merge(each[3]).merge(each[4])))
    for whole in (left, right):
        assert (whole.latents, whole.values) == (9, 9 * 2 * 4 * 4)
        np.testing.assert_allclose(whole.means, means, rtol=1e-14)
        np.testing.assert_allclose(whole.deviations, deviations, rtol=1e-13)
    assert ChannelSums.from_json(json.loads(json.dumps(left.to_json()))) == left


def test_they_describe_draws_from_the_posteriors() -> None:
    moments = moments_of(6)
    draws = torch.Generator().manual_seed(7)
    stacked = torch.stack(moments).double()
    means, deviations = stacked[:, :C], (0.5 * stacked[:, C:]).exp()
    noise = torch.randn(4000, *means.shape, generator=draws, dtype=torch.float64)
    drawn = (means + deviations * noise).transpose(0, 2).flatten(1)
    whole = ChannelSums()
    for m in moments:
        whole = whole.merge(ChannelSums.of(m))
    np.testing.assert_allclose(whole.means, drawn.mean(1), atol=5e-3)
    np.testing.assert_allclose(whole.deviations, drawn.std(1), rtol=5e-3)
    scale, shift = map(np.array, whole.scaling())
    standard = scale * (drawn.numpy() + shift)
    assert abs(standard.mean()) < 5e-3
    assert abs(standard.std() - 1) < 5e-3
    assert abs(standard.std(1) - 1).max() > 0.2  # one scale for channels that are not alike
    scale_C, shift_C = map(np.array, whole.scaling(per_channel=True))
    standard = scale_C[:, None] * (drawn.numpy() + shift_C[:, None])
    assert abs(standard.mean(1)).max() < 5e-3
    assert abs(standard.std(1) - 1).max() < 5e-3


def test_scale_and_shift_of_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="there are no latents"):
        ChannelSums().scaling()
    flat = ChannelSums(1, 8, (1.0, 1.0), (0.0, 4.0))
    with pytest.raises(UserError, match="latents that do not vary"):
        flat.scaling(per_channel=True)
    assert flat.scaling() == (2.0, -1.0)
    infinite = ChannelSums(1, 8, (1.0,), (float("inf"),)).to_json()
    for tree in ({}, {"latents": 1, "values": 2, "means": [1.0], "squares": []}, infinite):
        with pytest.raises(ValueError, match="no sums of channels"):
            ChannelSums.from_json(tree)


@pytest.mark.parametrize("place", ["local", "memory://stats/streamed"])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_a_folder_is_streamed_for_its_latents_alone(
    place: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latent_stats, "_READ", block)
    read: list[int] = []
    spans = Fetcher.spans

    def count(self: Fetcher, wanted: Sequence[Span]) -> list[bytes]:
        read.append(sum(span.end - span.start for span in wanted))
        return spans(self, wanted)

    monkeypatch.setattr(Fetcher, "spans", count)
    moments = moments_of(16)
    folder = write_set(str(tmp_path / "set") if place == "local" else place, moments)
    calls: list[tuple[int, int]] = []
    found = measure(folder, lambda *call: calls.append(call))
    means, deviations = by_numpy(moments)
    assert found.latents == 16
    np.testing.assert_allclose(found.means, means, rtol=1e-12)
    np.testing.assert_allclose(found.deviations, deviations, rtol=1e-12)
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert sum(read) == sum(len(pack_latent(m, "fp32")) for m in moments)
    assert len(read) == (16 if block == 1 else 3)


def test_manifests_stand_for_shards_unless_they_are_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_set(str(tmp_path / "set"), moments_of(16))
    streamed = measure(folder)
    write_manifests(folder)
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "read_range", lambda *_: pytest.fail("a shard was read"))
        kept = measure(folder)
    assert kept.latents == 16
    np.testing.assert_allclose(kept.means, streamed.means, rtol=1e-13)
    np.testing.assert_allclose(kept.squares, streamed.squares, rtol=1e-13)

    lies = {"latents": 1, "values": 1, "means": [9.0] * C, "squares": [1.0] * C}
    for path in Path(folder).glob("*_manifest.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"sums": lies}))
    assert measure(folder).latents == 3
    assert measure(folder, read=True) == streamed
    first, second, third = sorted(Path(folder).glob("*_manifest.json"))
    changes: list[dict[str, Any] | str] = [
        {"sums": None},
        {"samples": 3},
        {"files": {"tar": {"size": 1, "sha256": ""}}},
        {"sums": {"latents": 1}},
        "{",
    ]
    whole = json.loads(first.read_text())
    second.unlink()
    third.unlink()
    for change in changes:
        first.write_text(change if isinstance(change, str) else json.dumps(whole | change))
        assert measure(folder) == streamed


def test_the_encoding_job_leaves_the_sums_of_what_it_wrote(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    read = measure(toy.latents, read=True)
    with monkeypatch.context() as patch:
        patch.setattr(fetch, "read_range", lambda *_: pytest.fail("a shard was read"))
        kept = measure(toy.latents)
    assert kept.latents == read.latents == 24
    np.testing.assert_allclose(kept.means, read.means, rtol=1e-12)
    np.testing.assert_allclose(kept.squares, read.squares, rtol=1e-12)
    info = read_latent_set(toy.latents)
    np.testing.assert_allclose((info.scale, info.shift), read.scaling(), rtol=1e-9)


def test_what_is_written_is_what_training_reads(tmp_path: Path) -> None:
    one, two = moments_of(6, seed=1), moments_of(10, seed=2, mean=5.0)
    other = INFO.model_copy(update={"scale": 3.0, "samples": 7, "vae": VAE.model_copy(update={"name": "a copy"})})
    folders = [write_set(str(tmp_path / "one"), one), write_set("memory://stats/two", two, other)]
    check_same_autoencoder(folders)
    scale, shift = measure(folders[0]).merge(measure(folders[1])).scaling(per_channel=True)
    write_scaling(folders, scale, shift)
    means, deviations = by_numpy([*one, *two])
    for folder, info in zip(folders, (INFO, other), strict=True):
        now = read_latent_set(folder)
        np.testing.assert_allclose(now.scale, 1 / deviations, rtol=1e-12)
        np.testing.assert_allclose(now.shift, -means, rtol=1e-12)
        assert now == info.model_copy(update={"scale": now.scale, "shift": now.shift})
        assert torch.equal(read_unconditional(folder), torch.ones(1, 5))


def test_a_folder_that_cannot_be_written_leaves_all_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [write_set(str(tmp_path / name), moments_of(2)) for name in ("one", "two")]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    make = tempfile.mkdtemp

    def refuse(prefix: str, dir: str) -> str:
        if dir.endswith("two"):
            raise OSError(errno.EROFS, "Read-only file system")
        return make(prefix=prefix, dir=dir)

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)  # the tests may run as root, whom no mode stops
    with pytest.raises(UserError, match=r"cannot write .*two/latents\.json: Read-only file system"):
        write_scaling(folders, 2.0, 1.0)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_bad_folders_are_named(tmp_path: Path) -> None:
    good = write_set(str(tmp_path / "good"), moments_of(3))
    stranger = INFO.model_copy(update={"vae": LatentVAE(kind="lvdm", name="stranger", sha256="ef" * 32)})
    with pytest.raises(UserError, match=r"good and .*other hold .* vae\.sha256 abab\w+ \(somewhere\) and efef"):
        check_same_autoencoder([good, write_set(str(tmp_path / "other"), moments_of(3), stranger)])
    text = INFO.model_copy(update={"vae": None, "shapes": ()})
    texts = write_set(str(tmp_path / "texts"), moments_of(3), text)
    for call in (lambda: check_same_autoencoder([good, texts]), lambda: measure(texts)):
        with pytest.raises(UserError, match="texts holds text states alone"):
            call()
    with pytest.raises(UserError, match="holds no latents"):
        measure(str(tmp_path))
    broken = moments_of(3)
    broken[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"00001\.0\.latent\.safetensors in .*00000\.tar is bad: "):
        measure(write_set(str(tmp_path / "broken"), broken))


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the tool prints, as one line of words."""
    monkeypatch.setattr(sys, "argv", ["latent_stats", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    main()
    return " ".join(capsys.readouterr().out.split())


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = moments_of(6, seed=1), moments_of(10, seed=2, mean=5.0)
    folders = [write_set(str(tmp_path / "one"), one), write_set(str(tmp_path / "two"), two)]
    before = read_latent_set(folders[0])
    printed = call(monkeypatch, capsys, *folders)
    means, deviations = by_numpy([*one, *two])
    pooled = np.sqrt((deviations**2 + (means - means.mean()) ** 2).mean())
    assert f"{folders[0]}: 6 latents, 192 values a channel" in printed
    assert "all 2 folders: 16 latents, 512 values a channel" in printed
    row = " │ ".join(f"{value:.5g}" for value in (means[1], deviations[1], 1 / deviations[1], -means[1]))
    assert f"│ 1 │ {row} │" in printed
    row = " │ ".join(f"{value:.5g}" for value in (means.mean(), pooled, 1 / pooled, -means.mean()))
    assert f"│ all │ {row} │" in printed
    assert "nothing is written" in printed
    assert read_latent_set(folders[0]) == before
    alone = by_numpy(one)
    assert f"now mean {alone[0].mean():.4f}, std" in printed

    printed = call(monkeypatch, capsys, folders[1], f"{folders[1]}/", "--write")
    assert printed.count("written to") == 1
    assert f"{folders[1]}: then mean 0.0000, std 1.0000" in printed.replace("-0.0000", "0.0000")
    assert isinstance(read_latent_set(folders[1]).scale, float)
    assert read_latent_set(folders[0]) == before
    call(monkeypatch, capsys, *folders, "--per", "channel", "--write", "--read")
    assert [read_latent_set(folder).scale for folder in folders] == [pytest.approx(tuple(1 / deviations))] * 2


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    done = commands.call("tools/latent_stats.py", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"latent_stats: error: {tmp_path} holds no latents")
    assert len(done.stderr.splitlines()) == 1
