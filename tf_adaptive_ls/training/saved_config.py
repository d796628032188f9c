"""Versions saved configs, and checks them when they are read."""

from collections.abc import Sequence
from typing import Any

# Version 1 was written by tf_adaptive_ls 0.1.0, without a version number. Version 2 was written by
# 0.2.0, with other scales. Up to version 3, the graphs of wrapped models held `LossScaled` layers.
VERSION = 4
WITH_WRAPPERS = 3
_KNOWN = (2, 3, VERSION)
_KEY = "tf_adaptive_ls"


def with_version(config: dict[str, Any], version: int = VERSION) -> dict[str, Any]:
    """`config` with the version of the file format: its names, and the variables saved with it."""
    return {_KEY: version, **config}


def is_with_wrappers(config: Any) -> bool:
    """Whether a config of a wrapped model is so old that its graph holds `LossScaled` layers."""
    return isinstance(config, dict) and config.get(_KEY, 1) in (2, WITH_WRAPPERS)


def checked_config(
    config: Any, kind: str, required: Sequence[str], optional: Sequence[str] | None = ()
) -> dict[str, Any]:
    """Checks a config that `with_version` has made, and removes the version.

    Args:
        config: Dict, as read from a file.
        kind: What the config describes, for error messages.
        required: Names of the entries that it must have.
        optional: Names of the entries that it may have besides. `None` for any.

    Raises:
        ValueError: If its version cannot be read here, or if its entries are not as required.
    """
    if not isinstance(config, dict):
        raise ValueError(f"Expected the config of a {kind} to be a dict. Received: {config!r}.")
    config = dict(config)
    version = config.pop(_KEY, 1)
    if version not in _KNOWN:
        newer = isinstance(version, int) and version > VERSION
        known = f"{_KNOWN[0]} to {_KNOWN[-1]}"
        raise ValueError(
            f"Expected a {kind} saved in version {known} of the file format of tf_adaptive_ls. "
            f"Received: version {version!r}. "
            + (
                "Install a newer tf_adaptive_ls to load it."
                if newer
                else "Load it with the tf_adaptive_ls that wrote it, `strip_model` it, and wrap it "
                "anew here; scales are found again within a few steps."
            )
        )
    missing = [name for name in required if name not in config]
    unknown = [] if optional is None else sorted(config.keys() - {*required, *optional})
    if missing or unknown:
        raise ValueError(
            f"Expected the config of a {kind} to hold {', '.join(required)}"
            + (f", perhaps {', '.join(optional)}" if optional else "")
            + f". Received: {', '.join(map(str, config)) or 'nothing'}. The file is damaged: "
            "take another copy of it."
        )
    return config
