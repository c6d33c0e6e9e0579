"""Tests of the free memory of the host and of its containers."""

from pathlib import Path

import torch

from bilevel.problems.datasets import free_memory

CPU = torch.device("cpu")


def test_free_memory_of_the_host_is_known_on_linux():
    free = free_memory.free_bytes(CPU)
    assert free is None if not Path("/proc/meminfo").exists() else 2**20 < free < 2**50


def test_a_containers_limit_counts_less_what_it_uses_and_cached_files_as_free(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path)
    for name, text in {
        "max": "5000\n",
        "current": "4000\n",
        "stat": "anon 3000\ninactive_file 700\n",
    }.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory.free_bytes(CPU) == 1700
    (tmp_path / "memory.max").write_text("max\n")  # no limit
    assert free_memory.free_bytes(CPU) != 1700
