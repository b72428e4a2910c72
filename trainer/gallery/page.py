"""The gallery's one page, in NiceGUI: fields, a button, and the pictures of the runs beside each other."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nicegui import ui

from trainer.errors import UserError
from trainer.gallery.gallery import Gallery, Shown
from trainer.gallery.live_run import LiveRun
from trainer.gallery.requests import Request, field_of, parse

CSS = Path(__file__).with_name("gallery.css")
LOOK_S = 1.0
"""Between two looks at what other tasks have changed."""


class Page:
    """Of one browser tab."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self.shown: Sequence[Shown] = ()
        self.begun: float | None = None
        """When the button was pressed, while pictures are awaited."""
        self.client = ui.context.client
        with ui.element("main").classes("gallery"):
            with ui.element("header"):
                ui.label("Loupe").classes("brand")
                ui.html("Gallery", sanitize=False, tag="h1")
                self.heads = [self._head(run) for run in gallery.runs]
            self._form()
            with ui.element("section").props('aria-label="Pictures"'):
                self.pictures = ui.element("div")
        ui.timer(LOOK_S, self.look)

    def _head(self, run: LiveRun) -> tuple[ui.label, ui.label, ui.label]:
        with ui.element("div").classes("run"):
            return ui.label(run.title).classes("title"), ui.label().classes("newer"), ui.label().classes("trouble")

    def _form(self) -> None:
        gallery = self.gallery
        self.own = own = gallery.defaults()
        self.fields: dict[str, Any] = {}
        with ui.element("section").classes("form"):
            if gallery.of_classes:
                self.fields["classes"] = ui.number(f"Class, 0 to {gallery.num_classes - 1}", value=0, step=1)
            else:
                self.fields["prompt"] = ui.input("Prompt").props("autofocus").classes("prompt")
            with ui.element("div").classes("settings"):
                self.fields["sampler"] = ui.select(gallery.samplers, label="Sampler", value=own.sampler)
                self.fields["steps"] = ui.number("Steps", value=own.steps, step=1)
                self.fields["guidance"] = ui.number("Guidance", value=own.guidance, step=0.5)
                self.fields["seed"] = ui.number("Seed", value=own.seed, step=1)
                self.fields["size"] = ui.number("Size, px", value=own.resolution, step=1)
                self.fields["per-prompt"] = ui.number("Pictures", value=4, step=1)
            for name, field in self.fields.items():
                field.props(f'outlined dense no-error-icon name="{name}"')
                if name != "sampler":
                    field.on("keydown.enter", self.draw)
            more = [f"guided at times {first:g} to {last:g}" for first, last in filter(None, [own.guidance_interval])]
            more += [f"guidance rescaled by {own.guidance_rescale:g}"] * bool(own.guidance_rescale)
            if more:
                ui.label(f"As in the run's own samples: {', '.join(more)}").classes("muted")
            with ui.element("div").classes("actions"):
                self.button = (
                    ui.button("Draw", on_click=self.draw, color=None).props("unelevated no-caps").classes("go")
                )
                self.next = ui.button("Next seed", on_click=self.draw_next).props("outline no-caps")
                self.status = ui.label().classes("status").props('role="status"')
                self.problem = ui.label().classes("problem").props('role="alert"')

    # ---------------------------------------------------------------------------------------------------------- drawing

    async def draw_next(self) -> None:
        seed = self.fields["seed"]
        if isinstance(seed.value, int | float):
            seed.value = int(seed.value) + 1
        await self.draw()

    async def draw(self) -> None:
        if self.begun is not None:
            return
        self.say(None)
        try:
            values = {name: field.value for name, field in self.fields.items()}
            request = parse(values, self.own, of_classes=self.gallery.of_classes)
            self.begin(time.monotonic())
            shown = await self.gallery.draw(request, lambda: not self.client.is_deleted)
        except UserError as e:
            self.say(str(e))
        except Exception as e:
            # out of memory, most likely; the log has the rest
            self.say(f"failed: {type(e).__name__}; the terminal has more")
            raise
        else:
            if not self.client.is_deleted:
                self.show(request, shown)
        finally:
            self.begin(None)

    def begin(self, begun: float | None) -> None:
        self.begun = begun
        self.button.set_enabled(begun is None)
        self.next.set_enabled(begun is None)
        self.look()

    def say(self, message: str | None) -> None:
        """An error beside the field that it is about; None: take away what was said."""
        name, text = field_of(message) if message else (None, "")
        for other, field in self.fields.items():
            field.error = text if other == name else None
        self.problem.set_text("" if name else text)

    # ---------------------------------------------------------------------------------------------------------- showing

    def show(self, request: Request, shown: Sequence[Shown]) -> None:
        self.shown = shown
        self.pictures.clear()
        what = f"class {request.prompt}" if self.gallery.of_classes else request.prompt or "no prompt"
        with self.pictures:
            ui.label(f"{what}, seed {request.settings.seed}").classes("what")
        with self.pictures, ui.element("div").classes("runs" if len(shown) > 1 else "run-alone"):
            for one in shown:
                with ui.element("figure"):
                    with ui.element("figcaption"):
                        ui.label(f"{one.run}, step {one.step}, {one.weights}").classes("title")
                        ui.label(f"NFE {one.nfe}, {one.seconds:.1f} s").classes("muted")
                        if one.truncated:
                            ui.label("The prompt is longer than the text encoder takes, and was cut.").classes(
                                "trouble"
                            )
                    with ui.element("div").classes("pictures"):
                        for position, name in enumerate(one.pictures):
                            words = f"{what}: {one.run}, step {one.step}, picture {position}"
                            picture = ui.element("img")
                            # attributes as they are: a prompt is no list of props
                            picture.props["src"], picture.props["alt"] = f"picture/{name}.png", words
        self.look()

    def look(self) -> None:
        """Show what has changed meanwhile: newer weights, the turn."""
        for number, (run, (title, newer, trouble)) in enumerate(zip(self.gallery.runs, self.heads, strict=True)):
            title.set_text(run.title)
            step = run.model.step
            behind = number < len(self.shown) and self.shown[number].step != step
            newer.set_text(f"newer checkpoint: step {step}" if behind else "")
            trouble.set_text("; ".join(filter(None, (run.trouble, run.unlisted))))
        if self.begun is None:
            self.status.set_text("")
        else:
            before = self.gallery.waiting - 1
            waiting = f"; {before} more wait" if before > 0 else ""
            self.status.set_text(f"drawing, {time.monotonic() - self.begun:.0f} s{waiting}")
