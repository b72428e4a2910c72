"""`loupe doctor`'s checks of a machine's GPUs: what nvidia-smi says, and a process for each that tests it. No torch here.

With cpu, the same processes test a little of the machine's memory and processors.
"""

import csv
import dataclasses
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.doctor.checks import MIB, Finding, gib, some
from launch.doctor.rank import Plan
from launch.local import free_port
from trainer.config import CODE_ROOT

DENSE_BF16_TFLOPS = {
    "GB200": 2450, "B200": 2250, "GH200": 989, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "H800": 989,
    "H20": 148, "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A10": 125,
    "RTX 6000 Ada": 364,
}  # fmt: skip
"""Peaks without sparsity, by a part of the device's name, from NVIDIA's data sheets; the first that fits."""
LEAST_SHARE_OF_PEAK = 0.4
"""Of a large product, measured beside everything else that a node does; healthy ones reach 0.55 to 0.8."""
LEAST_SHARE_OF_MEDIAN = 0.7
LEAST_BUS_GB_PER_S = 5.0
"""Of an all-reduce over a node's GPUs; PCIe alone gives more."""
LARGEST_ERROR = 0.02
"""Of a bf16 product, relative; rounding gives 0.002."""
_AFTER_ERROR_S = 10.0
"""One process has failed: the others may end what they do for so long."""
_SMI_S = 20.0


@dataclass
class Report:
    """What one process has told."""

    rank: int
    doing: str = "start"
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None
    hung: bool = False
    """It was still at `doing` at the deadline."""


# ------------------------------------------------------------------------------------------------------- the processes


def measure(
    ranks: int, *, cpu: bool, quick: bool, deadline_s: float, command: Sequence[str] | None = None
) -> list[Report]:
    """Test all devices at once. None of the processes outlives the deadline.

    Args:
        command: what a process runs, but for its plan.
    """
    command = command or [sys.executable, "-m", "launch.doctor.rank"]
    matmul_s = 0.1 if cpu else 0.5 if quick else 3.0
    plan = Plan(
        rank=0, size=ranks, cuda=not cpu, port=free_port(),
        memory_bytes=(64 if quick else 256) * MIB if cpu else 0, side=512 if cpu else 8192, matmul_s=matmul_s,
        reduce_bytes=(1 if cpu else 256) * MIB, timeout_s=deadline_s,
    )  # fmt: skip
    ours = {"PYTHONPATH": str(CODE_ROOT), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if cpu:
        ours["CUDA_VISIBLE_DEVICES"] = ""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            text = json.dumps(dataclasses.asdict(dataclasses.replace(plan, rank=rank)))
            processes.append(subprocess.Popen(
                [*command, text], env={**os.environ, **ours}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, start_new_session=True,
            ))  # fmt: skip
        cut_short = _wait(processes, time.monotonic() + deadline_s)
        ended = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
    reports = [_report(rank, _said(process), ended[rank]) for rank, process in enumerate(processes)]
    for report in reports:
        report.hung = ended[report.rank] is None and not cut_short
    return reports


def _wait(processes: list[subprocess.Popen[bytes]], deadline: float) -> bool:
    """Until all have ended or must; whether they had to for the sake of one that failed."""
    failed_at: float | None = None
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if None not in codes:
            return False
        if failed_at is None and any(codes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + _AFTER_ERROR_S:
            return True
        time.sleep(0.05)
    return False


def _said(process: subprocess.Popen[bytes]) -> str:
    """What is in its pipe, without a wait: one that cannot be killed keeps it open."""
    assert process.stdout is not None
    assert process.stdin is not None
    os.set_blocking(process.stdout.fileno(), False)
    data = process.stdout.read(64 << 10) or b""
    process.stdout.close()
    process.stdin.close()
    return data.decode(errors="replace")


def _report(rank: int, said: str, code: int | None) -> Report:
    report = Report(rank)
    for line in said.splitlines():
        try:
            told = json.loads(line)
        except json.JSONDecodeError:  # a library's own words, or a line that a kill cut off
            continue
        if not isinstance(told, dict):
            continue
        if "doing" in told:
            report.doing = str(told["doing"])
        elif "error" in told:
            report.error = str(told["error"])
        else:
            report.facts |= {name: facts for name, facts in told.items() if isinstance(facts, dict)}
    if code and report.error is None:
        report.error = f"the process ended with code {code}"
    return report


# ------------------------------------------------------------------------------------------------------- what they say


def devices(ranks: int, *, cpu: bool, quick: bool, deadline_s: float) -> list[Finding]:
    return judge(measure(ranks, cpu=cpu, quick=quick, deadline_s=deadline_s), cpu=cpu)


def judge(reports: Sequence[Report], *, cpu: bool = False) -> list[Finding]:
    """Findings by what was tested. A device is compared with the others of its node, and with its data sheet."""
    kind = "CPU" if cpu else "GPU"
    findings = [_there(kind, reports)]
    for name, judged in (("memory", _judge_memory), ("matmul", _judge_matmul), ("all-reduce", _judge_all_reduce)):
        if name == "all-reduce" and len(reports) == 1:
            findings.append(Finding(f"{kind} all-reduce", "not here", f"one {kind}"))
        else:
            findings.append(_judged(f"{kind} {name}", name, reports, judged))
    return findings


def _there(kind: str, reports: Sequence[Report]) -> Finding:
    silent = [r for r in reports if "device" not in r.facts]
    bad = [_ended(kind, r) for r in silent]
    names = sorted({str(r.facts["device"].get("name")) for r in reports if "device" in r.facts})
    first = next((r.facts["device"] for r in reports if "device" in r.facts), {})
    figure = f"{len(reports) - len(bad)} of {len(reports)}: {some(names)}; torch {first.get('torch')}"
    if first.get("cuda") and kind == "GPU":
        figure += f", CUDA {first['cuda']}"
    if silent and all(r.hung and r.doing in ("start", "torch") for r in silent):
        mend = "the disk that Python's packages are on is slow, or the machine is busy"
        return Finding(f"{kind}s", "failed", f"torch was not loaded in time; {some(bad)}", mend)
    if bad:
        return Finding(
            f"{kind}s", "failed", f"{figure}; {some(bad)}", "see nvidia-smi and dmesg; ask for fewer", "node"
        )
    return Finding(f"{kind}s", "ok", figure)


def _ended(kind: str, report: Report) -> str:
    why = "no answer in time" if report.hung else report.error or "not measured, another one failed before it"
    return f"{kind} {report.rank}: {why}"


def _judged(name: str, step: str, reports: Sequence[Report], judged: Callable[[str, list[Report]], Finding]) -> Finding:
    measured = [report for report in reports if step in report.facts]
    silent = [report for report in reports if step not in report.facts]
    guilty = [report for report in silent if report.doing == step and (report.hung or report.error)]
    kind = name.partition(" ")[0]
    if guilty:
        mend = "see dmesg for Xid errors; have the device tested"
        return Finding(name, "failed", some([_ended(kind, report) for report in guilty]), mend, "node")
    if not measured:
        return Finding(name, "not here", "not measured")
    finding = judged(kind, measured)
    if silent and finding.status == "ok":
        missing = ", ".join(str(report.rank) for report in silent[:8])
        return dataclasses.replace(
            finding, status="warning", figure=f"{finding.figure}; not measured: {kind} {missing}"
        )
    return finding


def _judge_memory(kind: str, reports: list[Report]) -> Finding:
    facts = {r.rank: r.facts["memory"] for r in reports}
    bad = [f"{kind} {rank}: {f['wrong_words']} wrong words" for rank, f in facts.items() if f["wrong_words"]]
    tested, seconds = min(f["tested_bytes"] for f in facts.values()), max(f["seconds"] for f in facts.values())
    figures = {"tested_bytes": float(tested), "seconds": seconds}
    if bad:
        return Finding(f"{kind} memory", "failed", some(bad), "the device is broken: have it replaced", "node", figures)
    return Finding(f"{kind} memory", "ok", f"{gib(tested)} each hold what is written, {seconds:.1f} s", figures=figures)


def _judge_matmul(kind: str, reports: list[Report]) -> Finding:
    facts = {r.rank: r.facts["matmul"] for r in reports}
    speeds = {rank: float(f["tflops"]) for rank, f in facts.items()}
    median = statistics.median(speeds.values())
    bad = []
    for report in reports:
        speed, fact = speeds[report.rank], facts[report.rank]
        if not fact["same"] or fact["error"] > LARGEST_ERROR:
            bad.append(f"{kind} {report.rank}: wrong products (error {fact['error']:.2g})")
        elif kind == "GPU" and speed < LEAST_SHARE_OF_MEDIAN * median:
            bad.append(f"{kind} {report.rank}: {speed:.3g} TFLOP/s, the node's median is {median:.3g}")
        elif kind == "GPU" and speed < LEAST_SHARE_OF_PEAK * (
            peak := peak_of(str(report.facts["device"].get("name"))) or 0
        ):
            bad.append(f"{kind} {report.rank}: {speed:.3g} TFLOP/s of a peak of {peak}")
    figures = {f"tflops_{rank}": speed for rank, speed in speeds.items()}
    if bad:
        mend = "see nvidia-smi -q for clocks, temperatures and throttling; is another process at work on it?"
        return Finding(f"{kind} matmul", "failed", some(bad), mend, "node", figures)
    slowest = f", slowest {min(speeds.values()):.3g}" if len(speeds) > 1 else ""
    return Finding(f"{kind} matmul", "ok", f"{median:.3g} TFLOP/s{slowest}", figures=figures)


def peak_of(name: str) -> int | None:
    """Of a device by its name; None of one that is not known, or of a part of one."""
    if "MIG" in name:
        return None
    return next((peak for part, peak in DENSE_BF16_TFLOPS.items() if part in name), None)


def _judge_all_reduce(kind: str, reports: list[Report]) -> Finding:
    facts = [r.facts["all-reduce"] for r in reports]
    speed = min(float(f["bus_gb_per_s"]) for f in facts)
    figure, figures = f"{speed:.3g} GB/s on the bus", {"bus_gb_per_s": speed}
    name, mend = f"{kind} all-reduce", "see nvidia-smi topo -m and nvlink --status"
    if not all(f["right"] for f in facts):
        return Finding(name, "failed", "the sum is wrong", mend, "node", figures)
    if kind == "GPU" and speed < LEAST_BUS_GB_PER_S:
        return Finding(name, "warning", figure, mend, figures=figures)
    return Finding(name, "ok", figure, figures=figures)


# ----------------------------------------------------------------------------------------------------------- nvidia-smi


def count_gpus() -> int:
    """Of this process, as nvidia-smi tells; 0 where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        return sum(line.startswith("GPU ") for line in _smi("--list-gpus").splitlines())
    except (OSError, subprocess.TimeoutExpired):  # `hardware_errors` asks it as well, and tells
        return 0


def _smi(*arguments: str) -> str:
    result = subprocess.run(
        ["nvidia-smi", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=_SMI_S,
        stdin=subprocess.DEVNULL,
    )
    if result.returncode:
        raise OSError(
            f"nvidia-smi ended with {result.returncode}: {' '.join((result.stdout + result.stderr).split())[:300]}"
        )
    return result.stdout


def hardware_errors() -> list[Finding]:
    """What the driver has counted: memory errors that ECC could not mend, and rows that it ran out of spares for."""
    name, mend = "GPU errors", "reset the GPU or have it replaced"
    if shutil.which("nvidia-smi") is None:
        return [Finding(name, "not here", "no nvidia-smi")]
    try:
        ecc = _smi("--query-gpu=driver_version,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits")
        rows = _smi(
            "--query-remapped-rows=remapped_rows.pending,remapped_rows.failure", "--format=csv,noheader,nounits"
        )
    except subprocess.TimeoutExpired:
        return [Finding(name, "failed", f"nvidia-smi gave no answer within {_SMI_S:.0f} s", "reboot the node", "node")]
    except OSError as e:
        return [Finding(name, "failed", str(e), mend, "node")]
    return [judge_hardware(ecc, rows)]


def judge_hardware(ecc: str, rows: str) -> Finding:
    """From nvidia-smi's two tables, a line a GPU; what a device does not count, it gives as [N/A]."""
    failed, warned, driver = [], [], "unknown"
    for i, line in enumerate(_table(ecc)):
        driver = line[0]
        if len(line) > 1 and line[1].isdecimal() and int(line[1]):
            warned.append(f"GPU {i}: {line[1]} memory errors that ECC could not mend")
    for i, line in enumerate(_table(rows)):
        pending, failure = (*line, "", "")[:2]
        if failure.lower() in ("1", "yes"):
            failed.append(f"GPU {i}: no spare rows left in its memory")
        elif pending.lower() in ("1", "yes"):
            warned.append(f"GPU {i}: a row of its memory waits for a reset to be replaced")
    name, figure = "GPU errors", f"driver {driver}"
    if failed:
        return Finding(name, "failed", f"{figure}; {some(failed + warned)}", "have the GPU replaced", "node")
    if warned:
        return Finding(name, "warning", f"{figure}; {some(warned)}", "reset the GPU when the node is idle")
    return Finding(name, "ok", f"{figure}, none counted")


def _table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
