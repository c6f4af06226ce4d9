# SPDX-License-Identifier: Apache-2.0
"""Activation steering: directions that act on the residual stream while a model runs."""

from .apply import Steering as Steering
from .apply import steer as steer
from .condition import Condition as Condition
from .schedule import Schedule as Schedule
from .spec import Steer as Steer
