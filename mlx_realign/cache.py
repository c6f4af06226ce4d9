# SPDX-License-Identifier: Apache-2.0
"""Where results that another run can use again are kept."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder of tokenised data, reference log-probs and the like: $MLX_REALIGN_CACHE or ~/.cache/mlx_realign."""
    return Path(os.environ.get("MLX_REALIGN_CACHE") or "~/.cache/mlx_realign").expanduser()
