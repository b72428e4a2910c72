"""Kubernetes without a cluster: published schemas, strictly, and what a kubelet makes of a container."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CRDS = {
    "Job": "batch.volcano.sh_jobs.yaml",
    "JobSet": "jobset.x-k8s.io_jobsets.yaml",
    "PodMonitor": "monitoring.coreos.com_podmonitors.yaml",
}


def strict(schema: Any) -> Any:
    """A custom resource's schema that takes no field which it does not name; Kubernetes would drop those in silence."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    named = isinstance(found.get("properties"), dict) and found.get("type") == "object"
    if named and "additionalProperties" not in found and not found.get("x-kubernetes-preserve-unknown-fields"):
        found["additionalProperties"] = False
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    return found


@cache
def validator(path: Path, api_version: str) -> jsonschema.Draft202012Validator:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # seconds a file without libyaml
    crd = yaml.load(path.read_text(), Loader=loader)  # noqa: S506
    group, _, version = api_version.partition("/")
    assert crd["spec"]["group"] == group
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == version]
    schema = strict(schema)
    # Kubernetes' own, and a CRD says no more of it than that it is an object
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def validate_custom(resource: Mapping[str, Any], schemas: Path) -> None:
    """Raises jsonschema.ValidationError."""
    validator(schemas / CRDS[resource["kind"]], resource["apiVersion"]).validate(resource)


def environment_of(container: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, str]:
    """A container's variables as a kubelet sets them.

    Args:
        given: values of what comes from elsewhere, by the variable's name: fields of the pod, and what controllers add.
    """
    found = dict(given)
    for variable in container["env"]:
        name = variable["name"]
        if "valueFrom" in variable:
            assert name in given, name
        else:
            found[name] = expand(variable["value"], found)
    return found


def expand(text: str, variables: Mapping[str, str]) -> str:
    """$(NAME) by its value, $$ by $."""

    def one(match: "re.Match[str]") -> str:
        if match[0] == "$$":
            return "$"
        return variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", one, text)
