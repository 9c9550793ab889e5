"""What holds for every test: one thread for each process, and the same random numbers on every run."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

# Processes side by side do not fight for the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers(request: pytest.FixtureRequest) -> None:
    """Each test draws its own numbers, which neither its neighbours nor the order change.

    REPARAM_TEST_SEED=N (0 by default) has all of them draw others.
    """
    seed = zlib.crc32(f"{os.environ.get('REPARAM_TEST_SEED', '0')} {request.node.nodeid}".encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.fixture(autouse=True, scope="session")
def _functions_keep_their_id() -> Iterator[None]:
    """TorchScript knows functions by their `id`, also those that torch has let go since (in `torch.compile`'s imports).

    Where an attribute of a model then gets such an address, `torch.jit.script` takes it for the function, and fails.
    """
    kept, refresh = [], torch._ops._refresh_packet

    def keeping(packet: Any) -> None:
        kept.append(packet._op)
        refresh(packet)

    with mock.patch.object(torch._ops, "_refresh_packet", keeping):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """REPARAM_TEST_ORDER=N draws another order of files, and of tests within each: no test may need what ran before."""
    order = os.environ.get("REPARAM_TEST_ORDER")
    if order is None:
        return
    draw = random.Random(order)
    files = sorted({item.path for item in items})
    draw.shuffle(files)
    place = {path: index for index, path in enumerate(files)}
    items.sort(key=lambda item: (place[item.path], draw.random()))


@pytest.fixture
def nothing_compiled_before() -> Iterator[None]:
    """What torch knows of the code of one test shall not decide another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
