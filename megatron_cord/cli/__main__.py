"""``python -m megatron_cord.cli``: the console script ``cord`` where it is not installed."""

from megatron_cord.cli.main import main

if __name__ == "__main__":
    main()
