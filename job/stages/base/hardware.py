"""The first look at the GPU, before anything large is fetched; and what its failures mean later."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import structlog
import torch

from job.core.errors import CannotFitError, JobError, SickDeviceError
from job.edge.host.gpu import look_at_gpu
from job.stages.attempt import Attempt
from job.tune.device.device import choose_device, device_name, gpu_bus_id, gpu_uuid
from job.tune.device.failures import hardware_failure
from job.tune.device_check import look_at_device

log = structlog.get_logger(__name__)


def look_at_hardware(attempt: Attempt) -> torch.device:
    """Choose the device and see whether it can be trusted.

    Raises:
        SickDeviceError: it cannot, or there is none.
        CannotFitError: this kind of GPU cannot run the job.
    """
    with attempt.phases.phase("preflight"):
        device = choose_device(attempt.worker.device)
        attempt.standing.device = device_name(device)
        warnings: tuple[str, ...] = ()
        held_by = None
        if device.type == "cuda":
            health = look_at_gpu(uuid=gpu_uuid(device), bus_id=gpu_bus_id(device))
            log.info("gpu", **_known(asdict(health)))
            warnings, held_by = health.warnings, health.held_by
        facts = look_at_device(device, held_by=held_by)
        log.info("device", **_known(asdict(facts)))
    for warning in (*warnings, *facts.warnings):
        log.warning("device_warning", reason=warning)
        attempt.notes.append(warning)
    return device


@contextmanager
def hardware_errors(device: torch.device) -> Iterator[None]:
    """Tell an error that the hardware made from one that the program made.

    Raises:
        SickDeviceError: the error names the hardware, or its driver does when it is asked.
        CannotFitError: memory ran out where it cannot be recovered from.
    """
    try:
        yield
    except JobError:
        raise
    except torch.OutOfMemoryError as error:
        # Within a step it is recovered from; what is left is the base itself, or one example.
        raise CannotFitError(
            f"{device_name_or_kind(device)}: the model and one example do not fit its memory ({error}); use a GPU with "
            "more memory, or lower data.max_length or lora.r"
        ) from error
    except RuntimeError as error:
        if (said := hardware_failure(error)) is not None:
            raise SickDeviceError(
                f"{device_name_or_kind(device)}: {said}; start the same job on another node and have this one looked at"
            ) from error
        if device.type == "cuda":
            look_at_gpu(uuid=gpu_uuid(device), bus_id=gpu_bus_id(device))  # raises when it is sick
        raise


def device_name_or_kind(device: torch.device) -> str:
    """The device's name, also when it no longer answers."""
    try:
        return device_name(device)
    except RuntimeError:
        return str(device)


def _known(facts: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in facts.items() if value not in (None, (), [])}
