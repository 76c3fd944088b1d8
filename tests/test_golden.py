"""Our numbers against those measured from the published implementations (tests/golden/README.md).

A module a kind of vector; each finds its files in tests/golden and in the folder that GOLDEN_EXTRA names. The tests are
imported here so that this one file runs them all.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("golden_adm", "golden_diffusion", "golden_dydit", "golden_networks", "golden_sprint")

from golden_adm import *  # noqa: E402, F403
from golden_diffusion import *  # noqa: E402, F403
from golden_dydit import *  # noqa: E402, F403
from golden_networks import *  # noqa: E402, F403
from golden_sprint import *  # noqa: E402, F403
