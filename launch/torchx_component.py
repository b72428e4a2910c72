"""Loupe as a torchx component: `torchx run -s kubernetes -cfg queue=QUEUE launch/torchx_component.py:train -- RECIPE ...`.

The words after `--` are those of `launch/k8s.py`. torchx calls `pre_proc` of a role between making a scheduler's request
and sending it: there the Volcano job gets what torchx 0.7.0 has no words for, also under plain `torchx run`.
"""

from dataclasses import dataclass
from typing import Any

import click
from torchx import specs

from launch.pods.manifests import patch_volcano, pod_command
from launch.pods.options import job_options, spec_of
from launch.pods.spec import CONTAINER, KubernetesSpec
from trainer.config import RunConfig
from trainer.errors import UserError


@dataclass
class TrainRole(specs.Role):
    """The job's pods, a replica each."""

    spec: KubernetesSpec | None = None
    config: RunConfig | None = None

    def pre_proc(self, scheduler: str, dryrun_info: "specs.AppDryRunInfo[Any]") -> "specs.AppDryRunInfo[Any]":
        """
        Raises:
            UserError: the scheduler is not torchx's `kubernetes`, which is the one that this role is made for.
        """
        if scheduler != "kubernetes":
            raise UserError(f"-s {scheduler}: this component is for torchx's kubernetes; SLURM and this machine have "
                            "`loupe submit`")  # fmt: skip
        assert self.spec is not None
        assert self.config is not None
        patch_volcano(dryrun_info.request.resource, self.spec, self.config)
        return dryrun_info


def app_of(spec: KubernetesSpec, config: RunConfig) -> specs.AppDef:
    role = TrainRole(
        name=CONTAINER,
        image=spec.image,
        entrypoint="loupe",
        args=pod_command(spec, host_env="")[1:],
        num_replicas=spec.nodes,
        # a whole pod is written in `pre_proc`
        resource=specs.Resource(cpu=0, memMB=0, gpu=0 if spec.cpu else spec.gpus_per_node),
        spec=spec,
        config=config,
    )
    return specs.AppDef(name=spec.name, roles=[role])


def train(*arguments: str) -> specs.AppDef:
    """Train a recipe on Kubernetes, as a Volcano job.

    Args:
        arguments: as of launch/k8s.py: a recipe, --image, --run-dir, --nodes, ...
    """

    @click.command("train")
    @job_options
    def parse(**options: Any) -> tuple[KubernetesSpec, RunConfig]:
        return spec_of(**options)

    spec, config = parse.main(list(arguments), prog_name="train", standalone_mode=False)
    return app_of(spec, config)
