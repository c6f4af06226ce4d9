# SPDX-License-Identifier: Apache-2.0
"""`python -m mlx_realign <name>` is `mlx-realign <name>`."""

from mlx_realign.cli import entry

if __name__ == "__main__":
    raise SystemExit(entry())
