"""Whether a calibration was made on the weights that are here."""

from __future__ import annotations

from safetensors import safe_open

from shadowkv.common.errors import SkvError
from shadowkv.contract.calibration import UNKNOWN
from shadowkv.contract.method import Method
from shadowkv.models.loading import LoadedModel


def check_weights(method: Method, loaded: LoadedModel) -> None:
    """Raise `SkvError` if a calibration that `method` names was made on other weights than these, by its own account.

    Random weights have no checksum: a calibration that fits their geometry will do for times and bytes.
    """
    for parameter, path in method.files().items():
        if path.suffix != ".safetensors" or loaded.weights_sha256 is None:
            continue
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        made_on = about.get("weights_sha256", UNKNOWN), about.get("adapter_sha256")
        here = loaded.weights_sha256, loaded.adapter.sha256 if loaded.adapter else None
        if made_on[0] != UNKNOWN and made_on != here:
            raise SkvError(
                f"{method.core.name}: {parameter}={path.stem} was calibrated on other weights than these of "
                f"{loaded.name} ({about.get('model', UNKNOWN)}); make one with: skv calibrate {method.core.name}"
            )
