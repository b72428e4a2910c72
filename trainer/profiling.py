"""Traces of steps while a run trains: `profile` of its config. Until its window torch's profiler is not even imported."""

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from trainer.activity import Activity
from trainer.config import ProfileConfig
from trainer.errors import one_line
from trainer.parallel.world import World
from trainer.reports import Reports
from trainer.run_folder import RunFolder
from trainer.stage_times import OUTSIDE
from trainer.trace_summary import Interval, Span, page, summarise

FOLDER = "profile"
_NCCL_KERNELS = ("ncclDevKernel", "ncclKernel")
_GLOO = "gloo:"
_READ = "aten::_local_scalar_dense"
_SYNCHRONIZE = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_STAGE = "stage:"


class Profiler:
    """Told of each step's end; on the ranks that write a trace it opens and closes the window."""

    def __init__(
        self, config: ProfileConfig | None, world: World, folder: RunFolder, reports: Reports, activity: Activity
    ) -> None:
        """`config`: None: no trace is wanted."""
        self._config, self._world, self._folder = config or ProfileConfig(), world, folder
        self._stages, self._activity = reports.stages, activity
        self._note = reports.note if world.is_main else partial(print, flush=True)
        self._steps = 0
        """Of this start."""
        self._profile: Any = None
        self._done = config is None

    def end_step(self, step: int) -> None:
        """After a step, `step` of the run. On every rank."""
        self._steps += 1
        if self._done:
            return
        after = self._steps - self._config.after_steps
        traces = self._world.rank in self._config.ranks
        if after == 0 and traces:
            self._try(self._begin)
        elif after == self._config.num_steps:
            self._done = True
            with self._stages(OUTSIDE):
                # minutes for a long window; no rank is to be taken for one that hangs
                self._activity.doing("writing the profile", "other")
                if self._profile is not None:
                    self._try(partial(self._end, step))
                self._world.barrier()

    def _try(self, part: Callable[[], None]) -> None:
        """No run ends for the want of a trace."""
        try:
            part()
        except Exception as e:
            self._stages.annotate(None)
            self._profile = None
            self._note(f"WARNING: the profile is not written ({one_line(e)})")

    def close(self) -> None:
        """The steps end: a window that is open is none."""
        if self._profile is not None:
            self._stages.annotate(None)
            self._profile.stop()
        last = self._config.after_steps + self._config.num_steps
        if not self._done and 0 < self._steps < last and self._world.is_main:
            self._note(f"profile: none, as this start took {self._steps} steps and its window ends after {last}; lower "
                       "profile.after_steps or profile.num_steps")  # fmt: skip
        self._profile, self._done = None, True

    def _begin(self) -> None:
        from torch.profiler import ProfilerActivity, profile, record_function

        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize()  # what was queued before is of no step of the window
        self._profile = profile(activities=activities)
        self._profile.start()
        self._stages.annotate(lambda stage: record_function(f"{_STAGE}{stage}"))

    def _end(self, step: int) -> None:
        profile, self._profile = self._profile, None
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()  # within the last stage, whose end is the window's
        self._stages.annotate(None)
        profile.stop()
        count, rank, cuda = self._config.num_steps, self._world.rank, self._world.device.type == "cuda"
        name = f"{FOLDER}/step-{step:08d}-rank-{rank}"
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "trace.json.gz")
            profile.export_chrome_trace(path)
            with open(path, "rb") as file:
                self._folder.write_bytes(f"{name}.json.gz", file.read())
        spans = list(spans_of(profile.events(), cuda=cuda))
        summary = summarise(spans, _window(spans), count)
        device = torch.cuda.get_device_name() if cuda else f"a CPU, {torch.get_num_threads()} thread(s)"
        title = f"{count} steps up to step {step}, rank {rank} of {self._world.size}"
        self._folder.write_text(f"{name}.md", page(summary, title, device, f"{os.path.basename(name)}.json.gz"))
        self._note(
            f"profile of {title}: {self._folder.url}/{name}.md and .json.gz ({summary.step_ms:.1f} ms a step, "
            f"{summary.idle:.0%} idle, {summary.exposed_ms:.1f} ms of communication exposed)"
        )


def _window(spans: list[Span]) -> Interval:
    """From the first stage to the end of the last: they follow each other without a gap."""
    stages = [span for span in spans if span.kind == "stage"]
    return min(span.begin for span in stages), max(span.end for span in stages)


def spans_of(events: Any, *, cuda: bool) -> Iterator[Span]:
    """Of torch's `FunctionEvent`s. `cuda`: of a step on a GPU, where a wait is CUDA's; on a CPU it is a value that is read."""
    for event in events:
        name, begin, end = event.name, event.time_range.start, event.time_range.end
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if name.startswith(_STAGE):
            if not on_device:
                yield Span(name.removeprefix(_STAGE), begin, end, "stage")
        elif name.startswith(_GLOO) or (on_device and name.startswith(_NCCL_KERNELS)):
            yield Span(name, begin, end, "communication")
        elif event.is_user_annotation or event.is_async:
            continue
        elif on_device:
            yield Span(name, begin, end, "device", own=end - begin)
        else:
            if name in _SYNCHRONIZE if cuda else name == _READ:
                yield Span(name, begin, end, "wait")
            if not name.startswith("c10d::"):  # queues a collective, or on a CPU runs it
                yield Span(name, begin, end, "host", own=event.self_cpu_time_total)
