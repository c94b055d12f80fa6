"""The cores that a process may use, and the threads that it starts."""

import os

import pytest
import torch

from rlora_trl.trainer import cores


def test_cores_are_those_of_the_process(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert cores.available_cores(tmp_path, tmp_path / "missing") == 6
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, number in (("-1", 6), ("250000", 3), ("10000", 1), ("900000", 6)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert cores.available_cores(tmp_path, tmp_path / "missing") == number
    for quota, number in (("max", 6), ("400000", 4), ("50000", 1)):
        (tmp_path / "cpu.max").write_text(f"{quota} 100000\n")
        assert cores.available_cores(tmp_path, tmp_path / "missing") == number


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "name, quotas, number",
    [
        ("/jobs/mine", {"jobs/mine": 2, "jobs/other": 1}, 2),
        ("/jobs/mine", {"jobs": 3}, 3),  # of a group around it
        ("/jobs/mine", {"jobs": 1, "jobs/mine": 2}, 1),
        ("/docker/1234", {"": 4}, 4),  # named as the host does, seen from a container
        ("/../other", {"": 4, "other": 1}, 4),
        ("/", {"": 2, "jobs": 1}, 2),
    ],
)
def test_cores_are_those_of_the_control_group(monkeypatch, tmp_path, version, name, quotas, number):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    membership = tmp_path / "membership"
    membership.write_text(f"4:memory:/none\n3:cpu,cpuacct:{name}\n0::/\n" if version == 1 else f"0::{name}\n")
    for group, quota in quotas.items():
        folder = tmp_path / "groups" / ("cpu" if version == 1 else ".") / group
        folder.mkdir(parents=True, exist_ok=True)
        if version == 1:
            (folder / "cpu.cfs_quota_us").write_text(f"{quota}00000\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")
        else:
            (folder / "cpu.max").write_text(f"{quota}00000 100000\n")
    assert cores.available_cores(tmp_path / "groups", membership) == number


@pytest.mark.parametrize(
    "environment, threads",
    [
        ({}, 6),
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "False"}, 6),  # the launcher's default
        ({"OMP_NUM_THREADS": "3", "ACCELERATE_USE_CPU": "False"}, None),
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"WORLD_SIZE": "2"}, None),
    ],
)
def test_threads(monkeypatch, environment, threads):
    for name in ("OMP_NUM_THREADS", "ACCELERATE_USE_CPU", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(cores, "available_cores", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    cores.use_all_cores()
    assert chosen == ([threads] if threads else [])
