"""What a run says of an evaluation: a gauge, a line, a record that readers of losses pass over."""

from launch.console import MetricsTail, losses
from trainer.exporter import Exporter
from trainer.metric_names import shown_in_lines
from trainer.parallel.world import World
from trainer.reports import Reports
from trainer.run_folder import RunFolder


def test_an_evaluation_is_told_beside_the_losses(tmp_path, alone: World, capsys) -> None:
    folder, exporter = RunFolder(str(tmp_path)), Exporter()
    records = folder.metrics_writer(0)
    reports = Reports(alone, exporter, records, total_steps=10)
    loss = {"step": 2, "phase": "train", "images_per_s": 1.0, "loss": {"loss": 0.5}}
    records.write(loss)
    reports.evaluated(2, {"psnr_db": 20.5, "frechet": float("nan")}, "PSNR 20.50 dB")
    reports.evaluated(4, {"psnr_db": 21.5}, "PSNR 21.50 dB")
    records.close()
    assert folder.metrics() == [loss]
    assert folder.evaluations() == [{"step": 2, "psnr_db": 20.5, "frechet": None}, {"step": 4, "psnr_db": 21.5}]
    assert capsys.readouterr().out.splitlines()[0] == "evaluation at step 2:  PSNR 20.50 dB"
    (file,) = MetricsTail(folder).poll()
    assert [record["step"] for record in file.records] == [2]
    assert file.notes[1] == "evaluation at step 4:  PSNR 21.50 dB"
    assert exporter.registry.get_sample_value("loupe_evaluation", {"metric": "psnr_db"}) == 21.5


def test_a_later_attempts_evaluation_stands(tmp_path) -> None:
    folder = RunFolder(str(tmp_path))
    for attempt, value in enumerate((1.0, 2.0)):
        writer = folder.metrics_writer(attempt)
        writer.write({"time": 0.0, "note": "x", "evaluation": {"step": 4, "psnr_db": value}})
        writer.close()
    assert folder.evaluations() == [{"step": 4, "psnr_db": 2.0}]


def test_lines_tell_what_is_trained_for_and_metrics_the_rest() -> None:
    terms = (
        "loss",
        "l1",
        "l2",
        "lpips",
        "kl",
        "codebook",
        "generator",
        "discriminator",
        "outliers",
        "denoising",
        "lpl",
        "gate",
    )
    assert all(map(shown_in_lines, terms))
    details = {
        "reconstruction",
        "adaptive_weight",
        "logits_real",
        "logits_fake",
        "perplexity",
        "codebook_usage",
        "lpl_1",
    }
    record = {"loss": dict.fromkeys([*terms, *details], 0.25)}
    assert losses(record) == "  ".join(f"{term} 0.25" for term in terms)
