"""The checks of devices: wrong words and slow or silent devices are found, and processes that hang are ended."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from launch.doctor.device import Report, count_gpus, hardware_errors, judge, judge_hardware, measure, peak_of
from launch.doctor.rank import check_memory, count_wrong, fill

MIB = 1 << 20
CPU = torch.device("cpu")


def test_a_wrong_bit_is_counted_whichever_way_it_sticks() -> None:
    address_N = torch.arange(1024, dtype=torch.int32)
    chunks = [torch.empty_like(address_N) for _ in range(3)]
    for inverted in (False, True):
        fill(chunks, address_N, inverted=inverted)
        assert count_wrong(chunks, address_N, inverted=inverted) == 0
        chunks[1][700] ^= 1 << 9
        assert count_wrong(chunks, address_N, inverted=inverted) == 1
    fill(chunks, address_N, inverted=False)
    before = chunks[0].clone()
    fill(chunks, address_N, inverted=True)
    assert bool((chunks[0] == ~before).all()), "each bit is tested as 0 and as 1"


def test_words_that_share_a_cell_are_found() -> None:
    address_N = torch.arange(1024, dtype=torch.int32)
    shared = torch.empty_like(address_N)
    chunks = [shared, shared]
    fill(chunks, address_N, inverted=False)
    assert count_wrong(chunks, address_N, inverted=False) == 1024


def test_so_much_memory_is_tested_and_no_more() -> None:
    assert check_memory(CPU, 5 * MIB, 2 * MIB) == (4 * MIB, 0)


def test_two_processes_measure_here() -> None:
    findings = {f.name: f for f in judge(measure(2, cpu=True, quick=True, deadline_s=120), cpu=True)}
    assert {name: f.status for name, f in findings.items()} == {
        "CPUs": "ok", "CPU memory": "ok", "CPU matmul": "ok", "CPU all-reduce": "ok",
    }  # fmt: skip
    assert findings["CPU memory"].figures["tested_bytes"] == 64 * MIB
    assert findings["CPU all-reduce"].figures["bus_gb_per_s"] > 0


STAND_IN = """
import json, sys, time
plan = json.loads(sys.argv[1])
def say(**what): print(json.dumps(what), flush=True)
say(doing="device"); say(device={"name": "a device"})
say(doing="memory")
if plan["rank"] == 1 and sys.argv[2] == "hang": time.sleep(1000)
if plan["rank"] == 1 and sys.argv[2] == "error": say(error="RuntimeError: CUDA error: uncorrectable ECC error"); sys.exit(1)
if plan["rank"] == 1 and sys.argv[2] == "die": sys.exit(3)
say(memory={"tested_bytes": 1, "wrong_words": 0, "seconds": 0.1})
say(doing="all-reduce")
time.sleep(1000)
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [("hang", "no answer in time"), ("error", "uncorrectable ECC error"), ("die", "the process ended with code 3")],
)
def test_a_device_that_hangs_or_fails_is_named_within_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, said: str
) -> None:
    monkeypatch.setattr("launch.doctor.device._AFTER_ERROR_S", 0.3)
    program = tmp_path / "device.py"
    program.write_text(STAND_IN.replace("sys.argv[2]", repr(what)))
    began = time.monotonic()
    reports = measure(2, cpu=True, quick=True, deadline_s=2.0, command=[sys.executable, str(program)])
    assert time.monotonic() - began < 200
    findings = {f.name: f for f in judge(reports)}
    assert findings["GPUs"].status == "ok"
    memory = findings["GPU memory"]
    assert (memory.status, memory.blame) == ("failed", "node")
    assert memory.figure == f"GPU 1: {said}" or said in memory.figure
    assert findings["GPU matmul"].status == "not here"


def reports(*tflops: float, name: str = "NVIDIA H200") -> list[Report]:
    return [
        Report(rank, "done", {
            "device": {"name": name, "torch": "2.13.0", "cuda": "13.0"},
            "memory": {"tested_bytes": 1 << 30, "wrong_words": 0, "seconds": 1.0},
            "matmul": {"tflops": speed, "same": True, "error": 0.002},
            "all-reduce": {"bus_gb_per_s": 300.0, "right": True},
        })
        for rank, speed in enumerate(tflops)
    ]  # fmt: skip


def test_healthy_gpus() -> None:
    assert {f.status for f in judge(reports(700, 690, 710, 600))} == {"ok"}


def test_one_gpu_has_nobody_to_reduce_with() -> None:
    assert [f.status for f in judge(reports(700))] == ["ok", "ok", "ok", "not here"]


def test_a_gpu_below_its_neighbours_fails_though_its_data_sheet_allows_it() -> None:
    found = judge(reports(700, 690, 480, 710))[2]
    assert found.status == "failed"
    assert found.figure.startswith("GPU 2: 480 TFLOP/s")
    assert judge(reports(700, 690, 500, 710))[2].status == "ok", "500 is 72 % of the median"


def test_gpus_that_are_all_slow_fail_by_the_data_sheet() -> None:
    assert judge(reports(300, 300))[2].status == "failed"
    assert judge(reports(300, 300, name="a device of tomorrow"))[2].status == "ok"
    assert peak_of("NVIDIA H100 PCIe") == 756
    assert peak_of("NVIDIA H200 MIG 1g.18gb") is None


def test_wrong_numbers_fail_at_any_speed() -> None:
    wrong = reports(700, 700)
    wrong[0].facts["matmul"]["same"] = False
    assert judge(wrong)[2].figure.startswith("GPU 0: wrong products")
    wrong = reports(700, 700)
    wrong[1].facts["memory"]["wrong_words"] = 3
    assert judge(wrong)[1].figure == "GPU 1: 3 wrong words"
    wrong[1].facts["all-reduce"]["right"] = False
    assert (judge(wrong)[3].status, judge(wrong)[3].figure) == ("failed", "the sum is wrong")


def test_a_slow_disk_under_torch_is_not_the_nodes_fault() -> None:
    slow = [Report(0, "torch", hung=True), Report(1, "torch", hung=True)]
    assert (judge(slow)[0].status, judge(slow)[0].blame) == ("failed", "nobody")
    missing = [Report(0, "device", error="0 GPU(s) are visible"), reports(1, 1)[1]]
    assert (judge(missing)[0].status, judge(missing)[0].blame) == ("failed", "node")


def test_what_the_driver_has_counted() -> None:
    assert judge_hardware("580.1, 0\n580.1, [N/A]\n", "0, 0\n0, 0\n").status == "ok"
    assert judge_hardware("580.1, 2\n", "0, 0\n").status == "warning"
    assert judge_hardware("580.1, 0\n", "1, 0\n").status == "warning"
    found = judge_hardware("580.1, 0\n580.1, 0\n", "No, No\nNo, Yes\n")
    assert (found.status, found.blame) == ("failed", "node")
    assert "GPU 1: no spare rows" in found.figure


SMI = """#!/bin/sh
case "$SMI" in
fails) echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."; exit 9 ;;
hangs) exec sleep 100 ;;
esac
case "$1" in
--list-gpus) echo "GPU 0: NVIDIA H200 (UUID: GPU-0)"; echo "GPU 1: NVIDIA H200 (UUID: GPU-1)" ;;
--query-gpu=*) echo "580.1, 0"; echo "580.1, 0" ;;
--query-remapped-rows=*) echo "0, 0"; echo "0, 1" ;;
esac
"""


@pytest.mark.parametrize(
    ("what", "gpus", "said"),
    [
        ("answers", 2, "GPU 1: no spare rows left in its memory"),
        ("fails", 0, "couldn't communicate with the NVIDIA driver"),
        ("hangs", 0, "nvidia-smi gave no answer"),
    ],
)
def test_nvidia_smi_is_asked_and_need_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, gpus: int, said: str
) -> None:
    """A script in its place: there is no driver on the machines that tests run on."""
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SMI", what)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("launch.doctor.device._SMI_S", 0.5 if what == "hangs" else 120.0)
    assert count_gpus() == gpus
    (found,) = hardware_errors()
    assert (found.status, found.blame) == ("failed", "node")
    assert said in found.figure
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3,5")
    assert count_gpus() == 3


def test_what_a_process_says_besides_is_passed_over(tmp_path: Path) -> None:
    program = tmp_path / "noisy.py"
    program.write_text(
        "print('NCCL version 2'); print('[1]'); print('{\"device\": {\"name\": \"x\"}}'); print('{\"dev')"
    )
    (report,) = measure(1, cpu=True, quick=True, deadline_s=120, command=[sys.executable, str(program)])
    assert report.facts == {"device": {"name": "x"}}
    assert json.dumps(report.error) == "null"
