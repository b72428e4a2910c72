"""GPU: what DCGM exporter says. It must be given ops/grafana/dcgm-counters.csv: its own list leaves some of these out."""

from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units

from ops.dashboards.board import Section, board, variable
from ops.dashboards.kit import (
    GREEN,
    GREY,
    ORANGE,
    RED,
    YELLOW,
    Column,
    Look,
    PanelBuilder,
    Query,
    curves,
    number,
    rows,
    words,
)

_HERE = 'Hostname=~"$node", gpu=~"$gpu"'
_NAME = "{{Hostname}} {{gpu}}"
_SHOWN = 32
"""Curves of a chart at most: those of the GPUs that stand out."""
_REASONS = {"power cap": 0x4, "hardware slow-down": 0x8, "too hot": 0x20, "much too hot": 0x40, "power brake": 0x80}
"""Bits of NVML's nvmlClocksEventReasons that lower the clock of a GPU that has work."""
_BAD_REASONS = ("hardware slow-down", "much too hot", "power brake")
_REASON_COLORS = {
    "power cap": "#E0B400", "hardware slow-down": "#C4162A", "too hot": "#FF780A", "much too hot": "#FF7383",
    "power brake": "#B877D9",
}  # fmt: skip
_HOT = ((None, GREEN), (80, YELLOW), (87, RED))


def build() -> models.Dashboard:
    return board(
        uid="loupe-gpu",
        title="Loupe / GPU",
        description="GPUs as DCGM exporter sees them: work, memory, power, temperature, throttling and errors.",
        variables=[
            variable("node", "Node", "DCGM_FI_DEV_GPU_UTIL", of="Hostname"),
            variable("gpu", "GPU", 'DCGM_FI_DEV_GPU_UTIL{Hostname=~"$node"}', of="gpu"),
        ],
        sections=[
            Section("Now", _now()),
            Section("Work", _work()),
            Section("Power, temperature, clocks", _power()),
            Section("Errors", _errors()),
            Section("Links", _links()),
        ],
    )


def _dcgm(name: str) -> str:
    return f"DCGM_FI_{name}{{{_HERE}}}"


def _each(expression: str) -> str:
    return f"max by (Hostname, gpu) ({expression})"


def _highest(name: str) -> Query:
    return Query(f"topk({_SHOWN}, {_each(_dcgm(name))})", _NAME)


def _lowest(name: str) -> Query:
    return Query(f"bottomk({_SHOWN}, {_each(_dcgm(name))})", _NAME)


def _memory_share() -> str:
    used, free = _each(_dcgm("DEV_FB_USED")), _each(_dcgm("DEV_FB_FREE"))
    return f"{used} / ({used} + {free})"


def _throttled(*bits: int) -> str:
    """How many GPUs have one of these reasons. Older exporters call the mask otherwise."""
    mask = f"({_each(_dcgm('DEV_CLOCKS_EVENT_REASONS'))} or {_each(_dcgm('DEV_CLOCK_THROTTLE_REASONS'))})"
    return f"sum(clamp_max({' + '.join(f'floor({mask} / {bit}) % 2' for bit in bits)}, 1))"


def _uncorrected() -> str:
    """Since the driver was loaded: what no ECC could mend, and rows that were replaced for it."""
    return f"({_each(_dcgm('DEV_ECC_DBE_VOL_TOTAL'))} + {_each(_dcgm('DEV_UNCORRECTABLE_REMAPPED_ROWS'))})"


def _now() -> list[PanelBuilder]:
    none = "no GPU is watched"
    return [
        number(Look("GPUs", "That DCGM exporter tells of.", units.Short, 4, 5, steps=((None, GREY),), none=none),
               f"count({_dcgm('DEV_GPU_UTIL')})"),
        number(Look("Busy", "Mean share of time in which a kernel ran. It says nothing of how much of the GPU the "
                    "kernel uses.",
                    units.Percent, 4, 5, decimals=0, minimum=0, maximum=100, steps=((None, RED), (50, YELLOW), (80, GREEN)),
                    none=none), f"avg({_dcgm('DEV_GPU_UTIL')})", sparkline=True),
        number(Look("Tensor cores active", "Mean share of cycles. Some 40 to 60 % is as much as training reaches.",
                    units.PercentUnit, 4, 5, decimals=1, minimum=0, steps=((None, RED), (0.1, YELLOW), (0.25, GREEN)),
                    none="not collected"), f"avg({_dcgm('PROF_PIPE_TENSOR_ACTIVE')})", sparkline=True),
        number(Look("Hottest", "Of all GPUs.", units.Celsius, 4, 5, mend="gpu-throttled", steps=_HOT, none=none),
               f"max({_dcgm('DEV_GPU_TEMP')})", sparkline=True),
        number(Look("Throttled", "GPUs whose clock is lowered by heat, the power brake or a hardware slow-down. A "
                    "power cap is not "
                    "counted: at full load it is normal.", units.Short, 4, 5, mend="gpu-throttled",
                    steps=((None, GREEN), (1, RED)), none="not collected"),
               _throttled(*(_REASONS[name] for name in _BAD_REASONS))),
        number(Look("GPUs with an XID", "Whose last XID error is not 0, since the exporter was started.", units.Short, 4, 5,
                    mend="gpu-xid", steps=((None, GREEN), (1, RED)), none=none),
               f"count({_dcgm('DEV_XID_ERRORS')} > 0) or 0 * count({_dcgm('DEV_XID_ERRORS')})"),
    ]  # fmt: skip


def _work() -> list[PanelBuilder]:
    return [
        curves(Look("Busy", "Share of time in which a kernel ran, of the least busy GPUs.", units.Percent, 8, 8, minimum=0,
                    maximum=100), _lowest("DEV_GPU_UTIL")),
        curves(Look("Tensor cores active", "Share of cycles, of the least active GPUs.", units.PercentUnit, 8, 8, minimum=0,
                    none="not collected"), _lowest("PROF_PIPE_TENSOR_ACTIVE")),
        curves(Look("Means over GPUs", "Share of cycles: multiprocessors with work, tensor cores, and the memory's "
                    "interface. A high "
                    "memory share with idle tensor cores: the step is bound by memory.", units.PercentUnit, 8, 8, minimum=0,
                    maximum=1, none="not collected"),
               Query(f"avg({_dcgm('PROF_SM_ACTIVE')})", "multiprocessors"),
               Query(f"avg({_dcgm('PROF_PIPE_TENSOR_ACTIVE')})", "tensor cores"),
               Query(f"avg({_dcgm('PROF_DRAM_ACTIVE')})", "memory")),
        curves(Look("Memory in use", "Share, of the fullest GPUs.", units.PercentUnit, 12, 8, minimum=0, maximum=1,
                    steps=((None, GREEN), (0.95, YELLOW), (0.99, RED))),
               Query(f"topk({_SHOWN}, {_memory_share()})", _NAME), limits=True),
        curves(Look("Memory in use", "Sum over a node's GPUs.", units.Mebibytes, 12, 8, minimum=0),
               Query(f"sum by (Hostname) ({_dcgm('DEV_FB_USED')})", "{{Hostname}}"), stacked=True),
    ]  # fmt: skip


def _power() -> list[PanelBuilder]:
    return [
        curves(Look("Power", "Of the GPUs that draw most.", units.Watt, 8, 8, minimum=0), _highest("DEV_POWER_USAGE")),
        curves(Look("Power of nodes", "Sum over a node's GPUs.", units.Watt, 8, 8, minimum=0),
               Query(f"sum by (Hostname) ({_dcgm('DEV_POWER_USAGE')})", "{{Hostname}}"), stacked=True),
        curves(Look("Temperature", "Of the hottest GPUs.", units.Celsius, 8, 8, mend="gpu-throttled", steps=_HOT),
               _highest("DEV_GPU_TEMP"), limits=True),
        curves(Look("Temperature of memory", "Of the hottest GPUs; HBM slows down above 95 °C.", units.Celsius, 8, 8,
                    mend="gpu-throttled", steps=((None, GREEN), (90, YELLOW), (95, RED))), _highest("DEV_MEMORY_TEMP"),
               limits=True),
        curves(Look("Clock of multiprocessors", "In MHz, of the slowest GPUs.", "suffix: MHz",
                    8, 8, minimum=0), _lowest("DEV_SM_CLOCK")),
        curves(Look("Clocks lowered", "GPUs by what lowers their clock. A power cap is normal at full load.",
                    units.Short, 8, 8,
                    mend="gpu-throttled", minimum=0, colors=_REASON_COLORS, none="not collected"),
               *(Query(_throttled(bit), name) for name, bit in _REASONS.items())),
    ]  # fmt: skip


def _errors() -> list[PanelBuilder]:
    none = "not collected"
    xids = words({
        13: ("13: a kernel's fault", YELLOW), 31: ("31: a kernel's fault", YELLOW), 43: ("43: a program's fault", YELLOW),
        45: ("45: cleaned up after another", YELLOW), 48: ("48: memory, beyond ECC", RED), 63: ("63: row replaced", ORANGE),
        64: ("64: row not replaced", RED), 74: ("74: NVLink", RED), 79: ("79: fallen off the bus", RED),
        94: ("94: memory, contained", ORANGE), 95: ("95: memory, not contained", RED), 119: ("119: firmware hangs", RED),
        120: ("120: firmware", RED),
    })  # fmt: skip
    return [
        rows(Look("Last XID", "The last error that the driver told of each GPU, 0 where none; by NVIDIA's catalogue of "
                  "XIDs.",
                  units.Short, 8, 8, mend="gpu-xid", none="no GPU is watched"),
             [Column("Hostname", "Node"), Column("gpu", "GPU", width=60),
              Column("xid", "XID", units.NoUnit, mappings=[words({0: ("none", GREEN)}), xids], steps=((None, GREEN), (1,
              RED)))],
             Query(f"sort_desc({_each(_dcgm('DEV_XID_ERRORS'))})", "xid"), by="gpu", sort="XID", descending=True),
        curves(Look("Memory errors beyond ECC", "Since the driver was loaded, of GPUs with most: uncorrectable errors, "
                    "and rows "
                    "replaced for them.", units.Short, 8, 8, mend="gpu-ecc", minimum=0, none=none),
               Query(f"topk({_SHOWN}, {_uncorrected()})", _NAME)),
        curves(Look("Memory errors that ECC mended", "An hour. A few are normal; many of one GPU announce worse.",
                    "suffix: /h", 8, 8,
                    mend="gpu-ecc", minimum=0, none=none),
               Query(f"topk({_SHOWN}, 3600 * {_each(f'rate({_dcgm(_MENDED)}[$__rate_interval])')})", _NAME)),
        curves(Look("Rows replaced", "Rows of memory that were replaced for correctable errors, and GPUs that have no "
                    "spare row left.",
                    units.Short, 12, 7, mend="gpu-ecc", minimum=0, none=none),
               Query(f"sum by (Hostname) ({_dcgm('DEV_CORRECTABLE_REMAPPED_ROWS')})", "replaced {{Hostname}}"),
               Query(f"sum by (Hostname) ({_dcgm('DEV_ROW_REMAP_FAILURE')})", "no spare row {{Hostname}}")),
        curves(Look("PCIe retries", "An hour, of GPUs with most: a bad riser or slot.", "suffix: /h", 12, 7, minimum=0),
               Query(f"topk({_SHOWN}, 3600 * {_each(f'rate({_dcgm(_REPLAYS)}[$__rate_interval])')})", _NAME)),
    ]  # fmt: skip


_MENDED = "DEV_ECC_SBE_VOL_TOTAL"
_REPLAYS = "DEV_PCIE_REPLAY_COUNTER"


def _links() -> list[PanelBuilder]:
    none = "not collected"
    return [
        curves(Look("NVLink", "Bytes a second, mean over GPUs, payload only.", units.BytesPerSecondIEC, 8, 8, minimum=0,
                    none=none),
               Query(f"avg({_dcgm('PROF_NVLINK_TX_BYTES')})", "sent"), Query(f"avg({_dcgm('PROF_NVLINK_RX_BYTES')})",
               "received")),
        curves(Look("NVLink, least", "Received bytes a second of the GPUs that get least: one far below the others "
                    "holds all up.",
                    units.BytesPerSecondIEC, 8, 8, minimum=0, none=none), _lowest("PROF_NVLINK_RX_BYTES")),
        curves(Look("PCIe", "Bytes a second, mean over GPUs: what is copied from the host, and to network cards.",
                    units.BytesPerSecondIEC, 8, 8, minimum=0, none=none),
               Query(f"avg({_dcgm('PROF_PCIE_TX_BYTES')})", "sent"), Query(f"avg({_dcgm('PROF_PCIE_RX_BYTES')})",
               "received")),
    ]  # fmt: skip
