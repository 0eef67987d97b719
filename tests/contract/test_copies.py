"""Contract 4: copies, pickles and threads."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from cases import CASES, Case
from models import assert_same, cut_of, gradients

import skipat_surgery

pytestmark = [
    pytest.mark.contract("copies, threads"),
    pytest.mark.parametrize("case", CASES, ids=lambda case: case.name),
]


def test_deepcopy_after_a_forward_and_after_a_training_step(case: Case) -> None:
    cut, images = cut_of(case.model()), case.images()
    for _ in range(2):
        twin = copy.deepcopy(cut)
        with torch.no_grad():
            assert_same(case.tensors(twin, images), case.tensors(cut, images), atol=0, rtol=0)
            skipat_surgery.restore(twin)  # leaves the original cut
            case.tensors(twin, images)
        gradients(case, cut, images)
        torch.optim.SGD(cut.parameters(), 1e-3).step()


def test_pickle_after_a_forward_and_after_a_training_step(case: Case) -> None:
    stock, images = case.model(), case.images()
    cut = cut_of(stock)
    for _ in range(2):
        with torch.no_grad():
            case.tensors(stock, images)
            expected = case.tensors(cut, images)
        try:
            pickle.dumps(stock)
        except Exception as error:
            pytest.skip(f"the stock model cannot be pickled either: {error}")
        twin = pickle.loads(pickle.dumps(cut))
        with torch.no_grad():
            assert_same(case.tensors(twin, images), expected, atol=0, rtol=0)
            skipat_surgery.restore(twin)
            case.tensors(twin, images)
        gradients(case, cut, images)
        torch.optim.SGD(cut.parameters(), 1e-3).step()


def test_six_threads_on_one_model(case: Case) -> None:
    cut = cut_of(case.model())
    batches = [case.images(seed=seed) for seed in range(6)]
    with torch.no_grad():
        expected = [case.tensors(cut, images) for images in batches]
    wrong: list[str] = []

    def work(index: int) -> None:
        try:
            for _ in range(5):
                with torch.no_grad():
                    assert_same(case.tensors(cut, batches[index]), expected[index], atol=1e-12, rtol=1e-9)
        except Exception as error:
            wrong.append(f"thread {index}: {error}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
