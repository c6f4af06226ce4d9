# SPDX-License-Identifier: Apache-2.0
"""The one exception for input the user can mend."""


class UserError(Exception):
    """Flags, config, data or model are wrong. The message says file, line or field, what was expected, what to do.

    The command line prints it as one message without a traceback and exits with code 2.
    """
