"""A network over latents, trained to tell the classes of images: what E-LatentLPIPS takes its features from."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import Batch
from trainer.config import LatentNetworkConfig, RunConfig
from trainer.errors import UserError
from trainer.models.autoencoders import Codec, load_codec
from trainer.models.latent_vgg import LatentVGG
from trainer.parallel.apply import autocast
from trainer.step_plan import StepPlan
from trainer.stored_batch import scaled_latents
from trainer.tasks.base import Task
from trainer.tensors import pixels_to_images


class LatentNetworkTask(Task):
    def __init__(self, run: RunConfig, device: torch.device, *, codec: Codec | None = None) -> None:
        """`codec`: an autoencoder that is there already, in place of the config's files."""
        assert isinstance(run.task, LatentNetworkConfig)
        self.config, self._run, self._device = run.task, run, device
        self.codec = (load_codec(self.config.codec) if codec is None else codec).to(device)
        torch.manual_seed(run.seed)  # the same weights on every rank and any number of them
        self.module: LatentVGG = LatentVGG(
            self.config.model, self.config.codec.latent_channels, self.config.num_classes
        )
        self.module.init_weights()

    def sharding_units(self) -> list[nn.Module]:
        return list(self.module.stages)

    def check(self) -> list[str]:
        return []

    def forward_backward(self, batch: Batch, plan: StepPlan, scale: float) -> dict[str, Tensor]:
        self._check_labels(batch)
        labels_B = batch.labels_B.to(self._device, non_blocking=True)
        images = pixels_to_images(batch.images_BCHW.to(self._device, non_blocking=True))
        with autocast(self._device):
            with self.stages("encode", "encoder"):
                if batch.latents_BCHW is None:
                    with torch.no_grad():
                        z0 = self.codec.encode(images).float()
                else:
                    z0 = scaled_latents(batch, self.codec, seed=self._run.seed, device=self._device)
            with self.stages("forward"):
                logits = self.module(z0).float()
        loss_B = F.cross_entropy(logits, labels_B, reduction="none", label_smoothing=self.config.label_smoothing)
        with self.stages("backward"):
            (scale * loss_B.sum()).backward()
        accuracy_B = (logits.detach().argmax(1) == labels_B).float()
        return {"loss": loss_B.detach(), "accuracy": accuracy_B}

    def _check_labels(self, batch: Batch) -> None:
        """On the host: a wrong label on the device ends the process without a word."""
        for key, label in zip(batch.keys, batch.labels_B.tolist(), strict=True):
            if label >= self.config.num_classes:
                raise UserError(f"task.num_classes: label {label} of {key} is no class of 0..{self.config.num_classes - 1}; "
                                "set it to the number of the dataset's classes")  # fmt: skip
            if label < 0:
                raise UserError(
                    f"data.datasets: {key} has no label, which the latent_network task learns; build the dataset without it"
                )
