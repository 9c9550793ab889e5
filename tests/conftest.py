"""One thread for each test process, so that processes side by side do not fight for the cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
