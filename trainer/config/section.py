"""What all sections of the configuration share."""

from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from trainer.errors import UserError
from trainer.urls import holds_credentials

CODE_ROOT = Path(__file__).resolve().parents[2]
"""The checkout, or the snapshot of it that a job runs from."""

NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _holds_no_credentials(self) -> Self:
        """A config is written into the run folder, and shown by reports and sinks."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, str) and "://" in value and _is_secret(name, value):
                raise ValueError(f"{name}: the URL holds a password or a key; give credentials by the environment of the job, "
                                 "as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")  # fmt: skip
        return self


def _is_secret(name: str, url: str) -> bool:
    try:
        return holds_credentials(url)
    except UserError as e:
        raise ValueError(f"{name}: {e}") from None


S = TypeVar("S", bound=Section)


def replace(section: S, **changes: Any) -> S:
    """A copy with fields replaced, validated as a whole (`model_copy` would not)."""
    return type(section).model_validate({**_fields(section), **changes})


def _fields(section: Section) -> dict[str, Any]:
    return {name: getattr(section, name) for name in type(section).model_fields}


def resolve_url(url: str) -> str:
    """`repo://PATH` to a path within the code; any other URL as it is.

    Raises:
        UserError: the path leaves the code's folder.
    """
    if not url.startswith("repo://"):
        return url
    path = (CODE_ROOT / url.removeprefix("repo://")).resolve()
    if not path.is_relative_to(CODE_ROOT):
        raise UserError(f"{url}: leads out of the code's folder; give a plain path instead")
    return str(path)
