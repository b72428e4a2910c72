"""Run: is it healthy, what does it cost, where does its time go."""

from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import units

from ops.dashboards import expressions as ask
from ops.dashboards.board import Mark, Section, board, text, variable
from ops.dashboards.expressions import ONE_RUN, RANKS, of_run, or_zero, rate, series
from ops.dashboards.kit import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    STAGE_COLORS,
    STAT_COLORS,
    STATE_COLORS,
    TERM_COLORS,
    YELLOW,
    Column,
    Look,
    PanelBuilder,
    Query,
    bars,
    curves,
    number,
    rows,
    words,
)
from trainer import metric_names as names

_ALERTS_OF = 'run="$run"'
_NO_LOSS = "|".join(sorted({"gate", "perceptual_weight", "lpl_.*", *names.DETAILS}))
"""Terms that are told apart from losses: shares, weights, and parts of other terms."""
_DETAILS = "|".join(sorted({"lpl_.*", *names.DETAILS}))


def build() -> models.Dashboard:
    return board(
        uid="loupe-run",
        title="Loupe / Run",
        description="One training run: its health at a glance, then losses, speed, time and ranks.",
        variables=[
            variable("run", "Run", names.STEP.name, many=False),
            variable("job", "Job", f'{names.STEP.name}{{run="$run"}}', of="job_id"),
            variable("rank", "Rank", f'{names.PEAK_MEMORY.name}{{run="$run"}}'),
            text(
                "reports", "Reports", "http://127.0.0.1:8000",
                "Where run folders are served, so that links lead to reports: python -m http.server -d runs -b "
                "127.0.0.1 8000",
            ),
        ],
        marks=[
            Mark(
                "Phases",
                _new("run, phase", series(names.PHASE, ONE_RUN)),
                "phase {{phase}}",
                BLUE,
            ),
            Mark("Starts", _new("run, start", ask.info(ONE_RUN)), "start {{start}}", ORANGE),
        ],
        sections=[
            Section("Health", _health()),
            Section("Losses", _losses()),
            Section("Optimizer", _optimizer()),
            Section("Speed", _speed()),
            Section("Where the time goes", _time()),
            Section("Ranks", _ranks()),
            Section("This run", _facts()),
        ],
    )  # fmt: skip


def _new(by: str, of: str) -> str:
    """What is there now and was not in the hour that ended a minute ago: a mark a minute long."""
    return f"count by ({by}) ({of}) unless count by ({by}) (last_over_time({of}[1h] offset 1m))"


def _health() -> list[PanelBuilder]:
    state = {value: ask.STATE_WORDS[value] for value in (0, 1, 2)}
    return [
        number(Look(
            "State", "Training: its last step is younger than 20 of its steps, or five minutes. Stalled: older. "
            "Starting: this "
            "start has made no step yet. No answer: rank 0 cannot be asked; the run has ended, is queued, or is lost.",
            units.Short, 4, 5, mend="no-progress", none="no answer", steps=((None, RED), (1, BLUE), (2, GREEN)),
        ), ask.state(ONE_RUN), mappings=[words(state)], solid=True),
        number(Look(
            "Alerts", "Alerts of this run that fire now; Fleet lists them.", units.Short, 2, 5, none="no answer",
            steps=((None, GREEN), (1, RED)), links=[("All alerts", "/d/loupe-fleet")],
        ), or_zero(f'count by (run) (ALERTS{{alertstate="firing", {_ALERTS_OF}}})', ONE_RUN)),
        number(Look(
            "Done", "Steps done of all steps that the run is to have.", units.PercentUnit, 3, 5, minimum=0, maximum=1,
            decimals=1, steps=((None, BLUE), (1, GREEN)), none="no answer",
        ), f"{of_run(names.STEP, ONE_RUN)} / on (run) {of_run(names.PLANNED_STEPS, ONE_RUN)}"),
        number(Look(
            "Step", "Optimizer steps done, restarts included.", units.LocaleFormat, 3, 5, decimals=0,
            steps=((None, GREY),), none="no answer",
        ), of_run(names.STEP, ONE_RUN)),
        number(Look(
            "Time left", "Steps that are left, at the speed of the last half hour, steps that were done twice and restarts "
            "included.", units.DurationSeconds, 4, 5, decimals=0, steps=((None, GREY),), none="not stepping",
        ), ask.eta(ONE_RUN)),
        number(Look(
            "Last step", "How long ago the last step ended.", units.Seconds, 4, 5, mend="no-progress", decimals=0,
            steps=((None, GREEN), (120, YELLOW), (600, RED)), none="none yet",
        ), ask.age(names.LAST_STEP, ONE_RUN)),
        number(Look(
            "Last checkpoint", "How old the newest checkpoint is, in intervals between two: what would be lost now.",
            "suffix: intervals", 4, 5, mend="checkpoint-old", decimals=2,
            steps=((None, GREEN), (2, YELLOW), (3, RED)), none="none yet",
        ), f"({ask.age(names.CHECKPOINT_LAST, ONE_RUN)}) / on (run) ({of_run(names.CHECKPOINT_INTERVAL, ONE_RUN)} > 0)"),
        number(Look(
            "Loss", "Whole training loss, mean of the last interval.", units.Short, 4, 5, mend="loss-not-finite",
            decimals=4,
            steps=((None, GREY),), none="not told yet",
        ), of_run(names.LOSS, ONE_RUN, 'term="loss"'), sparkline=True),
        number(Look(
            "Images/s", "Images a second of all ranks, last interval.", "suffix: /s", 4, 5, decimals=1,
            steps=((None, GREY),), none="not told yet",
        ), of_run(names.IMAGES_PER_SECOND, ONE_RUN), sparkline=True),
        number(Look(
            "MFU", "Counted operations a second over the device's peak, frozen networks and LPL's decoder included.",
            units.PercentUnit, 4, 5, mend="mfu-drop", decimals=1, minimum=0,
            steps=((None, RED), (0.15, YELLOW), (0.3, GREEN)), none="not counted",
        ), of_run(names.MFU, ONE_RUN), sparkline=True),
        number(Look(
            "Goodput", "Share of the time since the first start, over all starts, in which steps were made that stand.",
            units.PercentUnit, 4, 5, decimals=1, minimum=0, maximum=1,
            steps=((None, RED), (0.7, YELLOW), (0.9, GREEN)), none="no answer",
        ), ask.goodput(ONE_RUN)),
        number(Look(
            "Goodput, last hour", "The same of the last hour.", units.PercentUnit, 4, 5, decimals=1, minimum=0, maximum=1,
            steps=((None, RED), (0.7, YELLOW), (0.9, GREEN)), none="too short",
        ), ask.recent_goodput(ONE_RUN)),
        number(Look(
            "Restarts", "Times the run has been started again, for any reason.", units.Short, 2, 5, mend="restart-storm",
            steps=((None, GREEN), (1, YELLOW), (5, RED)), none="no answer",
        ), ask.restarts(ONE_RUN)),
        number(Look(
            "Restarts left", "Share of the restart budget that is left.", units.PercentUnit, 2, 5, mend="restart-budget",
            minimum=0, maximum=1, decimals=0, steps=((None, RED), (0.2, YELLOW), (0.5, GREEN)), none="no answer",
        ), of_run(names.RESTARTS_LEFT, ONE_RUN)),
    ]  # fmt: skip


def _losses() -> list[PanelBuilder]:
    by_term = of_run(names.LOSS, ONE_RUN, f'term!~"{_NO_LOSS}"', by="run, term")
    return [
        curves(Look(
            "Losses by term", "Means of the last interval, before weighting, unless a name says weighted. `loss` is "
            "what is "
            "minimised.", units.Short, 12, 9, mend="loss-spike", colors=TERM_COLORS,
        ), Query(by_term, "{{term}}"), log=True),
        curves(Look(
            "Denoising loss by noise level", "Bin 0 has the least noise, 7 the most. A bin that rises alone says at "
            "which noise "
            "level training goes wrong.", units.Short, 12, 9, mend="loss-spike",
        ), Query(of_run(names.LOSS_BY_NOISE, ONE_RUN, by="run, bin"), "{{bin}}"), log=True),
        curves(Look(
            "Validation loss by noise level", "Denoising loss of the averaged weights on fixed images with fixed noise: 0 has "
            "the least noise. It rises while the training's falls where the model learns its images by heart.",
            units.Short, 12, 8, none="none yet",
        ), Query(of_run(names.VALIDATION_LOSS, ONE_RUN, 'term="denoising"', by="run, level"), "{{level}}"), log=True,
            points=True),
        curves(Look(
            "Validation of the perceptual loss", "The same of the phase's perceptual loss, without gate and weight.",
            units.Short, 12, 8, none="none yet",
        ), Query(of_run(names.VALIDATION_LOSS, ONE_RUN, 'term!="denoising"', by="run, term, level"), "{{term}} {{level}}"),
            log=True, points=True),
        curves(Look(
            "Perceptual loss: shares", "gate: share of the samples whose noise level is low enough for the perceptual "
            "loss. "
            "perceptual share: its part of the whole loss, where the phase's denoising_weight is 1.",
            units.PercentUnit, 8, 8, minimum=0, maximum=1, colors=TERM_COLORS,
        ), Query(of_run(names.LOSS, ONE_RUN, 'term="gate"'), "gate"),
            Query(_perceptual_share(), "perceptual share")),
        curves(Look(
            "Parts of the loss", "LPL by map of the decoder; of an autoencoder its parts, codebook and discriminator.",
            units.Short, 8, 8,
        ), Query(of_run(names.LOSS, ONE_RUN, f'term=~"{_DETAILS}"', by="run, term"), "{{term}}")),
        curves(Look(
            "Evaluations", "Of the averaged weights, whenever one is due.", units.Short, 8, 8, none="none yet",
        ), Query(of_run(names.EVALUATION, ONE_RUN, by="run, metric"), "{{metric}}"), points=True),
    ]  # fmt: skip


def _perceptual_share() -> str:
    def term(name: str) -> str:
        return of_run(names.LOSS, ONE_RUN, f'term="{name}"')

    return f"clamp_min(1 - ({term('denoising_weighted')} or {term('denoising')}) / on (run) {term('loss')}, 0)"


def _optimizer() -> list[PanelBuilder]:
    skipped = rate(names.STEPS_SKIPPED, ONE_RUN, by="run, reason")
    return [
        curves(Look("Gradient norm", "Of all weights, before clipping, at the last step read.", units.Short, 6, 7,
                    mend="gradient-spike"), Query(of_run(names.GRADIENT_NORM, ONE_RUN), "gradient norm"), log=True),
        curves(Look("Update ratio", "Norm of a step's update over the norm of the weights. Well above 0.01: the "
                    "learning rate is "
                    "high; well below 0.0001: nothing is learned.", units.ScientificNotation, 6, 7),
               Query(of_run(names.UPDATE_RATIO, ONE_RUN), "update ratio"), log=True),
        curves(Look("Learning rate", "Of the last step.", units.ScientificNotation, 6, 7, minimum=0),
               Query(of_run(names.LEARNING_RATE, ONE_RUN), "learning rate")),
        curves(Look("Steps refused, roll-backs", "A step is refused where a gradient is not finite or the loss jumps; "
                    "after "
                    "several jumps the run goes back to its last checkpoint.", "suffix: /h", 6, 7, mend="loss-not-finite",
                    minimum=0),
               Query(f"3600 * ({or_zero(skipped, ONE_RUN, 'reason', 'none refused')})", "{{reason}}"),
               Query(f"3600 * {rate(names.ROLL_BACKS, ONE_RUN)}", "roll-backs"), points=True),
    ]  # fmt: skip


def _speed() -> list[PanelBuilder]:
    return [
        curves(Look("Images a second", "Of all ranks: the last interval's, and counted between two scrapes.",
                    "suffix: /s", 6, 7,
                    minimum=0), Query(of_run(names.IMAGES_PER_SECOND, ONE_RUN), "last interval"),
               Query(rate(names.IMAGES, ONE_RUN), "counted")),
        curves(Look("FLOP/s of a rank", "Counted once a shape of the batch; the peak is the data sheet's, or measured.",
                    units.FlopsPerSecond, 6, 7, minimum=0),
               Query(of_run(names.FLOPS_PER_SECOND, ONE_RUN), "counted"),
               Query(of_run(names.PEAK_FLOPS, ONE_RUN, by="run, source"), "peak ({{source}})")),
        curves(Look("MFU", "Of the device's peak, frozen networks included.", units.PercentUnit, 6, 7, mend="mfu-drop",
                    minimum=0), Query(of_run(names.MFU, ONE_RUN), "MFU")),
        bars(Look("FLOPs of a step", "On all ranks, by part.", "suffix: FLOP", 6, 7, steps=((None, BLUE),), minimum=0),
             Query(of_run(names.FLOPS, ONE_RUN, by="run, part"), "{{part}}")),
    ]  # fmt: skip


def _time() -> list[PanelBuilder]:
    states = of_run(names.GOODPUT, ONE_RUN, by="run, state")
    return [
        curves(Look("A step by stage", "Mean seconds a step on rank 0. They stack to the whole step.", units.Seconds, 12, 9,
                    mend="data-wait", minimum=0, colors=STAGE_COLORS),
               Query(ask.step_seconds(ONE_RUN), "{{stage}}"), stacked=True),
        curves(Look("Step time", "Of rank 0's steps: half are shorter than p50, one of 100 is longer than p99. As fine "
                    "as the "
                    "histogram's buckets.", units.Seconds, 6, 9, minimum=0),
               Query(ask.step_quantile(0.5, ONE_RUN), "p50"), Query(ask.step_quantile(0.99, ONE_RUN), "p99")),
        bars(Look("Since the first start", "Hours by what the run did, over all its starts. All but productive is "
                  "overhead.",
                  units.Seconds, 6, 9, colors=STATE_COLORS, minimum=0), Query(f"sort_desc({states})", "{{state}}")),
    ]  # fmt: skip


def _ranks() -> list[PanelBuilder]:
    ratio_steps = ((None, GREEN), (1.1, YELLOW), (1.25, RED))
    return [
        curves(Look("Step time over ranks", "Last interval. They step together, so a gap tells of clocks, not of a "
                    "slow rank; "
                    "that is the next panel.", units.Seconds, 8, 8, minimum=0, colors=STAT_COLORS),
               Query(of_run(names.RANKS_STEP, ONE_RUN, by="run, stat"), "{{stat}}")),
        curves(Look("Own time over the median, by rank", "Time that a rank takes for itself before the others can go "
                    "on. Above 1 "
                    "the others wait for this one.", units.Short, 8, 8, mend="straggler", minimum=0, decimals=2,
                    steps=ratio_steps),
               Query(f"topk(16, {of_run(names.OWN_RATIO, RANKS, by='rank, node')})", "rank {{rank}} ({{node}})"),
               limits=True),
        curves(Look("Own time by rank", "Seconds a step, mean of the last window; the 16 slowest.", units.Seconds, 8, 8,
                    mend="straggler", minimum=0),
               Query(f"topk(16, {of_run(names.OWN_SECONDS, RANKS, by='rank, node')})", "rank {{rank}} ({{node}})")),
        curves(Look("Wait for data over ranks", "Seconds a step.", units.Seconds, 8, 8, mend="data-wait", minimum=0,
                    colors=STAT_COLORS),
               Query(of_run(names.RANKS_DATA_WAIT, ONE_RUN, by="run, stat"), "{{stat}}")),
        curves(Look("Peak memory", "Of the device, or on CPU of the process: over ranks, and of the ranks chosen above.",
                    units.BytesIEC, 8, 8, minimum=0, colors=STAT_COLORS),
               Query(of_run(names.RANKS_MEMORY, ONE_RUN, by="run, stat"), "{{stat}}"),
               Query(f"topk(16, {of_run(names.PEAK_MEMORY, RANKS, by='rank, node')})", "rank {{rank}} ({{node}})")),
        rows(Look("Ranks", "A line a rank: up is 1 where it answers. The node leads to its GPUs.", units.Short, 8, 8,
                  mend="target-down", none="no answer"),
             [Column("rank", "Rank", width=60),
              Column("node", "Node", link=("GPUs of this node", "/d/loupe-gpu?var-node=${__value.text}")),
              Column("up", "Up", mappings=[words({0: ("no", RED), 1: ("yes", GREEN)})], steps=((None, RED), (1, GREEN)),
              width=60),
              Column("ratio", "Own/median", decimals=2, steps=ratio_steps),
              Column("memory", "Peak memory", units.BytesIEC)],
             Query(f"max by (rank, node) (up{{{RANKS}}})", "up"),
             Query(f"max by (rank) ({series(names.OWN_RATIO, RANKS)})", "ratio"),
             Query(f"max by (rank) ({series(names.PEAK_MEMORY, RANKS)})", "memory"), by="rank", sort="Own/median",
             descending=True),
    ]  # fmt: skip


def _facts() -> list[PanelBuilder]:
    build = series(names.BUILD, ONE_RUN, 'rank="0"', part="info")
    return [
        rows(Look("Where it runs, samples and report", "`loupe runs report RUN --open` draws its samples, phases and "
                  "losses on one "
                  "page; the run's link leads to that page where run folders are served (Reports, above). `loupe runs "
                  "show RUN` "
                  "says the same in a terminal.", units.Short, 16, 5, none="no answer"),
             [Column("run", "Run", link=("Report and samples", "${reports}/${__value.text}/report.html")),
              Column("recipe", "Recipe"), Column("cluster", "Cluster"), Column("job_id", "Job"), Column("start", "Start"),
              Column("host", "Host of rank 0"), Column("folder", "Folder"), Column("version", "Loupe"),
              Column("torch", "Torch")],
             Query(f"{ask.info(ONE_RUN)} * on (run) group_left (version, torch) max by (run, version, torch) ({build})",
                   "one"), by="run"),
        number(Look("Ranks", "That train together.", units.Short, 4, 5, steps=((None, GREY),), none="no answer"),
               of_run(names.WORLD_SIZE, ONE_RUN)),
        number(Look("Rank-hours", "Hours since the first start times the present number of ranks: what the run has "
                    "cost so far, "
                    "in hours of GPUs, or of CPU ranks. Time between jobs, when nobody had it run, does not count.",
                    units.Short, 4, 5, decimals=1, steps=((None, GREY),), none="no answer"), ask.rank_hours(ONE_RUN)),
    ]  # fmt: skip
