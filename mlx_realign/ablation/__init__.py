# SPDX-License-Identifier: Apache-2.0
"""Ablation of directions: what a model writes to its residual stream loses a direction, in weights, exactly."""
