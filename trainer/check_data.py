"""Whether datasets fit the run, as far as they tell at its start."""

from collections.abc import Mapping

from data.demands import check_classes
from data.reader import Dataset
from trainer.config import RunConfig
from trainer.config.task import TaskConfig
from trainer.errors import UserError


def check_data(config: RunConfig, datasets: Mapping[str, Dataset]) -> list[str]:
    """Refuse labels that the model does not know, or that are not there; warn of what training does not stumble over.

    Raises:
        UserError: labels that do not fit the task.
    """
    warnings = []
    field, num_classes = _classes_of(config.task)
    for name, dataset in datasets.items():
        if num_classes:
            check_classes(field, num_classes, name, dataset.info)
        # numbered labels have no names: the first sample tells those from none
        if config.task.kind == "latent_network" and not dataset.class_names and dataset.read(0).label < 0:
            raise UserError(
                f"data.datasets.{name}: its samples have no labels, which the latent_network task learns; build it "
                "from a folder per class, or from a metadata.jsonl with labels"
            )
        largest = max(phase.resolution for phase in config.phases)
        if dataset.short_side and dataset.short_side < largest:
            warnings.append(
                f"data.datasets.{name}: images of {dataset.short_side} px are enlarged to {largest} px; build it with "
                f"--size {largest}"
            )
    return warnings


def _classes_of(task: TaskConfig) -> tuple[str, int | None]:
    """The field that says how many classes the task knows, and how many; None where labels play no part."""
    if task.kind == "latent_network":
        return "task.num_classes", task.num_classes
    if task.kind == "latent_diffusion" and task.text.kind == "classes":
        return "task.text.num_classes", task.text.num_classes
    return "", None
