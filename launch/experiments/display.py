"""What `loupe experiment` shows while its queue runs: bars in a terminal, else a line for each stage that ends. No torch."""

from datetime import timedelta

import click
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from launch.console import MetricsTail
from launch.experiments.queue import Job, Queue, Watcher
from trainer.run_folder import RunFolder


class PlainDisplay(Watcher):
    """A line for each stage that ends."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._news: list[str] = []

    def __enter__(self) -> "PlainDisplay":
        return self

    def __exit__(self, *error: object) -> None:
        self._flush("")

    def note(self, text: str) -> None:
        click.echo(text)

    def changed(self, job: Job, what: str) -> None:
        self._news.append(f"{job.name}: {what}")

    def tick(self, queue: Queue) -> None:
        if self._news:
            done = sum(job.state == "done" for job in queue.jobs)
            self._flush(f"; {done} of {self._total} done, left {timedelta(seconds=round(queue.left_s()))}")

    def _flush(self, tail: str) -> None:
        for line in self._news:
            click.echo(line + tail)
        self._news.clear()


class TerminalDisplay(PlainDisplay):
    """A bar over all jobs, and what runs now."""

    def __init__(self, total: int, console: Console) -> None:
        super().__init__(total)
        self._bar = Progress(
            TextColumn("runs"), BarColumn(bar_width=40), MofNCompleteColumn(), TextColumn("left {task.fields[left]}"),
            auto_refresh=False,
        )  # fmt: skip
        self._task = self._bar.add_task("runs", total=total, left="?")
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._tails: dict[str, tuple[MetricsTail, str]] = {}

    def __enter__(self) -> "TerminalDisplay":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def changed(self, job: Job, what: str) -> None:
        self.note(f"{job.name}: {what}")

    def tick(self, queue: Queue) -> None:
        done = sum(job.state == "done" for job in queue.jobs)
        self._bar.update(self._task, completed=done, left=str(timedelta(seconds=round(queue.left_s()))))
        table = Table.grid(padding=(0, 2))
        for job, stage, seconds in queue.running():
            progress = self._progress(job) if stage.name == "training" else ""
            table.add_row(job.name, stage.name, f"{seconds:.0f} s", progress)
        self._live.update(Group(self._bar, table), refresh=True)

    def _progress(self, job: Job) -> str:
        tail, text = self._tails.get(job.name, (MetricsTail(RunFolder(job.work_dir)), ""))
        for file in tail.poll():
            if file.records:
                record = file.records[-1]
                text = f"step {record['step']}/{record['total_steps']}  loss {record['loss'].get('loss', float('nan')):.3f}"
        self._tails[job.name] = tail, text
        return text


def display_for(total: int) -> PlainDisplay:
    console = Console()
    return TerminalDisplay(total, console) if console.is_terminal else PlainDisplay(total)
