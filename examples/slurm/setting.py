"""Print one value of a run's configuration, for scripts.

``python -m examples.slurm.setting model.checkpoint --config FILE [a.b=value …]``
"""

from __future__ import annotations

import sys
from functools import reduce

from megatron_cord.config.loading import load_config, to_dict
from megatron_cord.errors import CordError
from megatron_cord.runtime import entry


def main() -> None:
    """Print the value of the key that the first argument names."""
    from megatron_cord.trainer.config import RunConfig

    key, *rest = sys.argv[1:]
    arguments = entry.parse_args("Prints one value of a run's configuration.", arguments=rest)
    try:
        print(
            reduce(
                lambda section, name: section[name],
                key.split("."),
                to_dict(load_config(RunConfig, arguments.config, arguments.overrides)),
            )
        )
    except (KeyError, TypeError):
        raise CordError(f"{key} is no key of a run's configuration") from None


if __name__ == "__main__":
    entry.run(main)
